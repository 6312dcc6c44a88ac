"""``probe fit``: from labelled pictures to a probe."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
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
from fmupsample.labels.matching import Pair
from fmupsample.pipeline import Pipeline
from fmupsample.probing.batches import Example
from fmupsample.probing.cache import encode
from fmupsample.probing.options import FEW_STEPS, FEW_WHITEN, FitOptions, options_for
from fmupsample.probing.points import click_labels, read_clicks
from fmupsample.probing.probe import Probe, make_probe
from fmupsample.probing.store import Store
from fmupsample.probing.tasks import Classes, Depth, Task
from fmupsample.probing.training import Fit, fit_probe
from fmupsample.progress import SILENT, Progress

CLICK_RATE = 2e-3


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


def fit_labels(
    pipeline: Pipeline,
    labels: Mapping[Source, Tensor],
    task: Task,
    options: FitOptions,
    *,
    facts: Mapping[str, Any],
    validation: Mapping[Source, Tensor] | None = None,
    store: Store | None = None,
    progress: Progress = SILENT,
    card: Mapping[str, Any] | None = None,
    scored: bool = False,
) -> Fitted:
    """Fit a probe for ``task`` to pictures with the labels the task asks for.

    Args:
        facts: ``classes`` or ``depth`` of the probe.
        validation: chooses the learning rate; without it a share of the pictures is held out.
        store: where features and kernel weights are kept.
        card: more that the probe's card is to say.
        scored: give a score even where there is one learning rate, see :func:`best_of`.
    """
    store = Store() if store is None else store
    begun = time.perf_counter()

    def examples(given: Mapping[Source, Tensor], flips: bool) -> list[Example]:
        encoded = encode(pipeline, list(given), store, flips=flips, progress=progress)
        return [Example(e, y) for e, y in zip(encoded, given.values(), strict=True)]

    train = examples(labels, options.flips)
    held = examples(validation, False) if validation else []
    if len(train) == 1 and not held and not scored:
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


def fit_classes(
    pipeline: Pipeline,
    dataset: Dataset,
    table: ClassTable,
    options: FitOptions,
    *,
    validation: Dataset | None = None,
    **more: Any,
) -> Fitted:
    """Fit a segmentation probe to ``dataset``.

    Args:
        table: the classes, as :func:`fmupsample.labels.survey` settles them.
        more: ``store``, ``progress``, ``card``, ``scored`` of :func:`fit_labels`.

    Raises:
        UsageError, ImageError: pictures or labels that cannot be used.
    """
    read = partial(read_pair, table=table)
    more |= {"facts": {"classes": table}, "validation": _read(validation, read)}
    return fit_labels(pipeline, _read(dataset, read), Classes(len(table)), options, **more)


def fit_depth(
    pipeline: Pipeline,
    dataset: Dataset,
    high: float,
    options: FitOptions,
    *,
    low: float = 0.001,
    scale: float = SCALE,
    validation: Dataset | None = None,
    **more: Any,
) -> Fitted:
    """Fit a depth probe of 256 bins between ``low`` and ``high`` metres.

    Args:
        scale: units a metre in the 16-bit files, those that are read and those to be written.
        more: ``store``, ``progress``, ``card``, ``scored`` of :func:`fit_labels`.

    Raises:
        UsageError: a range that cannot be, or that 16 bits do not hold.
    """
    task = Depth(low, high)
    if high * scale > MOST_UNITS:
        raise UsageError(
            f"{high:g} m at {scale:g} units a metre do not fit into 16 bits: give a smaller "
            f"--depth-scale ({MOST_UNITS / high:.0f} at most) or --max-depth"
        )

    def read(pair: Pair) -> np.ndarray:
        return read_depth(pair.labels, scale)

    labels = _read(dataset, read)
    known = [own for own in map(task.known, labels.values()) if len(own)]
    near = min((torch.quantile(own, 0.02).item() for own in known), default=low)
    facts = {"low": low, "high": high, "scale": scale, "near": min(max(near, low), high)}
    more |= {"facts": {"depth": facts}, "validation": _read(validation, read)}
    return fit_labels(pipeline, labels, task, options, **more)


def fit_points(
    pipeline: Pipeline,
    points: str | Path,
    sources: Sequence[Source],
    *,
    rates: Sequence[float] | None = None,
    epochs: int | None = None,
    store: Store | None = None,
    progress: Progress = SILENT,
    card: Mapping[str, Any] | None = None,
    **options: Any,
) -> Fitted:
    """Fit a segmentation probe to clicks; see :mod:`fmupsample.probing.points`.

    Args:
        options: of :class:`.FitOptions`.

    Raises:
        UsageError: a click on no picture, outside it, of no class.
    """
    clicks, table = read_clicks(points, sources)
    # Within a quarter of a patch of where somebody clicked, it is the same thing.
    radius = min(pipeline.backbone.stride) / 4
    labels = {
        source: torch.from_numpy(click_labels(own, pipeline.frame(read_size(source.path)), radius))
        for source, own in clicks.items()
    }
    options |= {"whiten": FEW_WHITEN, "steps": FEW_STEPS if epochs is None else None}
    return fit_labels(
        pipeline,
        labels,
        Classes(len(table)),
        options_for(len(labels), rates=rates or (CLICK_RATE,), epochs=epochs, **options),
        facts={"classes": table},
        store=store,
        progress=progress,
        card={"clicks": sum(map(len, clicks.values())), **(card or {})},
    )


def _read(dataset: Dataset | None, read: Callable[[Pair], np.ndarray]) -> dict[Source, Tensor]:
    """The labels of every picture of a set."""
    pairs = [] if dataset is None else dataset.pairs
    return {pair.source: torch.from_numpy(read(pair)) for pair in pairs}


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
