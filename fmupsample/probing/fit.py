"""``probe fit``: from labelled pictures to a probe."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmupsample._version import __version__
from fmupsample.atomic import replacing
from fmupsample.errors import OutputError, UsageError
from fmupsample.images.find import Source, printable
from fmupsample.images.read import read_size
from fmupsample.labels.classes import ClassTable
from fmupsample.labels.dataset import Dataset, read_pair
from fmupsample.labels.depth import MOST_UNITS, SCALE, read_depth
from fmupsample.labels.layouts import Pair
from fmupsample.pipeline import Pipeline
from fmupsample.probing.cache import MemoryStore, Store, encode
from fmupsample.probing.linear import Example, Fit, FitOptions, fit_probe
from fmupsample.probing.points import click_labels, read_clicks
from fmupsample.probing.probe import Probe, make_probe
from fmupsample.probing.tasks import Classes, Depth, Task
from fmupsample.progress import SILENT, Progress

# Found on CamVid with whitened features: see research/benchmarks/README.md.
RATES = (1e-2, 3e-2, 1e-1, 3e-1)
FEW_PICTURES = 8  # so few are fitted at one rate, for this many steps
FEW_RATE, FEW_STEPS = 3e-2, 300
CLICK_RATE = 2e-3
# So little data says too little about each direction of the features to whiten them: two pictures
# of CamVid gave 51 mIoU without and 40 with whitening, clicks on two pictures 15 and 5.
FEW_WHITEN = 0.0


def options_for(
    pictures: int,
    *,
    rates: Sequence[float] | None = None,
    epochs: int | None = None,
    **more: Any,
) -> FitOptions:
    """The options for so many pictures, where they are left open.

    20 epochs and the best of four learning rates; for eight pictures or fewer 300 steps at one
    rate, since too little is left to choose by, on features that are not whitened.
    """
    few = pictures <= FEW_PICTURES
    rates = tuple(rates) if rates else (FEW_RATE,) if few else RATES
    if few:
        more = {"whiten": FEW_WHITEN, **more}
    if few and epochs is None:
        return FitOptions(rates, steps=FEW_STEPS, **more)
    return FitOptions(rates, epochs=20 if epochs is None else epochs, **more)


@dataclass(frozen=True)
class Fitted:
    """A probe and how it came about.

    Attributes:
        seconds: of ``encode`` (features and kernel weights that were not cached) and ``fit``.
    """

    probe: Probe
    fit: Fit
    options: FitOptions
    seconds: dict[str, float]


def fit_classes(
    pipeline: Pipeline,
    dataset: Dataset,
    table: ClassTable,
    options: FitOptions,
    *,
    validation: Dataset | None = None,
    store: Store | None = None,
    progress: Progress = SILENT,
    card: dict[str, Any] | None = None,
    scored: bool = False,
) -> Fitted:
    """Fit a segmentation probe to ``dataset``.

    Args:
        table: the classes, as :func:`fmupsample.labels.survey` settles them.
        validation: chooses the learning rate; without it a share of the pictures is held out.
        store: where features and kernel weights are kept.

    Raises:
        UsageError, ImageError: pictures or labels that cannot be used.
    """
    labels = {p: torch.from_numpy(read_pair(p, table)) for p in dataset.pairs}
    judged = {p: torch.from_numpy(read_pair(p, table)) for p in (validation or _NONE).pairs}
    return fit_labels(
        pipeline,
        labels,
        Classes(len(table)),
        options,
        validation=judged,
        store=store,
        progress=progress,
        facts={"classes": table},
        card=card,
        scored=scored,
    )


_NONE = Dataset([])


def fit_labels(
    pipeline: Pipeline,
    labels: dict[Pair, Tensor],
    task: Task,
    options: FitOptions,
    *,
    validation: dict[Pair, Tensor] | None = None,
    store: Store | None = None,
    progress: Progress = SILENT,
    facts: dict[str, Any],
    card: dict[str, Any] | None = None,
    scored: bool = False,
) -> Fitted:
    """Fit a probe for ``task`` to pictures with the labels the task asks for.

    Args:
        facts: ``classes`` or ``depth`` of the probe.
        scored: give a score even where there is one learning rate, see :func:`best_of`.
    """
    store = MemoryStore() if store is None else store
    begun = time.perf_counter()

    def examples(given: dict[Pair, Tensor], flips: bool) -> list[Example]:
        sources = [pair.source for pair in given]
        encoded = encode(pipeline, sources, store, flips=flips, progress=progress)
        return [Example(e, y) for e, y in zip(encoded, given.values(), strict=True)]

    train = examples(labels, options.flips)
    held = examples(validation, False) if validation else []
    if len(train) == 1 and not held and not scored and len(options.rates) > 1:
        options = replace(options, rates=options.rates[:1])
    encoded = time.perf_counter()
    assert pipeline.upsampler is not None
    fit = fit_probe(
        train, pipeline.upsampler, task, options, progress, validation=held, scored=scored
    )
    done = time.perf_counter()
    seconds = {"encode": round(encoded - begun, 3), "fit": round(done - encoded, 3)}
    card = {
        "tool": f"fmupsample {__version__}",
        "pictures": len(labels),
        "validation_pictures": len(validation or {}),
        "options": options.to_dict(),
        "rate": fit.rate,
        "scores": {f"{rate:g}": round(score, 6) for rate, score in fit.held_out.items()},
        "loss": round(fit.loss, 6),
        "seconds": seconds,
        **(card or {}),
    }
    return Fitted(make_probe(fit.probe, pipeline, card=card, **facts), fit, options, seconds)


def best_of(
    pipelines: Sequence[Pipeline],
    fit: Callable[[Pipeline], Fitted],
    done: Callable[[Pipeline], None] = lambda pipeline: None,
) -> Fitted:
    """Fit with the upsampler of each pipeline, and keep the one with the highest score.

    They share the cached features, the seed and so the order of pictures, flips and pixels; only
    the kernel weights differ. The card of the result says how all of them did.

    Args:
        fit: with ``scored``, so that there is a score.
        done: called after each, to give room back.
    """
    found: list[Fitted] = []
    for pipeline in pipelines:
        found.append(fit(pipeline))
        done(pipeline)
    scores = [fitted.probe.card["scores"] for fitted in found]
    best = max(range(len(found)), key=lambda i: found[i].fit.held_out[found[i].fit.rate])
    names = [fitted.probe.upsampler["name"] for fitted in found]
    seconds = {k: round(sum(f.seconds[k] for f in found), 3) for k in found[best].seconds}
    compared = dict(zip(names, scores, strict=True))
    card = found[best].probe.card | {"compared": compared, "seconds": seconds}
    return replace(found[best], probe=replace(found[best].probe, card=card), seconds=seconds)


def fit_depth(
    pipeline: Pipeline,
    dataset: Dataset,
    high: float,
    options: FitOptions,
    *,
    low: float = 0.001,
    scale: float = SCALE,
    validation: Dataset | None = None,
    store: Store | None = None,
    progress: Progress = SILENT,
    card: dict[str, Any] | None = None,
    scored: bool = False,
) -> Fitted:
    """Fit a depth probe of 256 bins between ``low`` and ``high`` metres.

    Args:
        scale: units a metre in the 16-bit files, those that are read and those to be written.

    Raises:
        UsageError: a range that cannot be, or that 16 bits do not hold.
    """
    task = Depth(low, high)
    if high * scale > MOST_UNITS:
        raise UsageError(
            f"{high:g} m at {scale:g} units a metre do not fit into 16 bits: give a smaller "
            f"--depth-scale ({MOST_UNITS / high:.0f} at most) or --max-depth"
        )

    def read(given: Dataset) -> dict[Pair, Tensor]:
        return {p: torch.from_numpy(read_depth(p.labels, scale)) for p in given.pairs}

    labels = read(dataset)
    known = [own for own in map(task.known, labels.values()) if len(own)]
    near = min((torch.quantile(own, 0.02).item() for own in known), default=low)
    facts = {"low": low, "high": high, "scale": scale, "near": min(max(near, low), high)}
    return fit_labels(
        pipeline,
        labels,
        task,
        options,
        validation=read(validation) if validation else None,
        store=store,
        progress=progress,
        facts={"depth": facts},
        card=card,
        scored=scored,
    )


def fit_points(
    pipeline: Pipeline,
    points: str | Path,
    sources: Sequence[Source],
    *,
    rates: Sequence[float] | None = None,
    epochs: int | None = None,
    store: Store | None = None,
    progress: Progress = SILENT,
    card: dict[str, Any] | None = None,
    **more: Any,
) -> Fitted:
    """Fit a segmentation probe to clicks; see :mod:`fmupsample.probing.points`.

    Raises:
        UsageError: a click on no picture, outside it, of no class.
    """
    clicks, table = read_clicks(points, sources)
    # Within a quarter of a patch of where somebody clicked, it is the same thing.
    radius = min(pipeline.backbone.stride) / 4
    labels = {
        Pair(source, Path(points)): torch.from_numpy(
            click_labels(own, pipeline.frame(read_size(source.path)), radius)
        )
        for source, own in clicks.items()
    }
    options = options_for(len(labels), rates=rates or (CLICK_RATE,), epochs=epochs, **more)
    options = replace(options, whiten=FEW_WHITEN, steps=FEW_STEPS if epochs is None else None)
    return fit_labels(
        pipeline,
        labels,
        Classes(len(table)),
        options,
        store=store,
        progress=progress,
        facts={"classes": table},
        card={"clicks": sum(map(len, clicks.values())), **(card or {})},
    )


def save_config(path: Path, probe: Probe) -> Path:
    """``probe.safetensors`` -> ``probe.json`` beside it: all that the header says, to be read.

    Its ``pictures`` are how many; how they were shown is ``image_size``, ``fit``, ``precision``.

    Raises:
        OutputError: it cannot be written.
    """
    beside = path.with_suffix(".json")
    config = {
        "task": probe.task,
        "backbone": probe.backbone,
        "upsampler": probe.upsampler,
        **probe.pictures,
        "classes": None if probe.classes is None else probe.classes.to_json(),
        "depth": probe.depth,
        **probe.card,
    }
    try:
        with replacing(beside) as temporary:
            temporary.write_text(json.dumps(config, indent=1) + "\n")
    except OSError as error:
        raise OutputError(f"{printable(beside)} cannot be written: {error.strerror}") from error
    return beside
