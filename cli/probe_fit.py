"""``fmupsample probe fit``: a linear probe from labelled pictures."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from fmupsample_cli import options as o
from fmupsample_cli import probe_fit_options as f
from fmupsample_cli import probe_options as p

if TYPE_CHECKING:
    from fmupsample.labels import Dataset, Survey
    from fmupsample.labels.depth import DepthSurvey
    from fmupsample.pipeline import Pipeline
    from fmupsample.probing.fit import Fitted
    from fmupsample.progress import Progress


def fit(
    images: p.ImagesFolder,
    labels: p.LabelsFolder = None,
    output: f.ProbeOutput = ...,
    layout: p.Layout = None,
    split: p.Split = None,
    classes: f.Classes = None,
    ignore: p.Ignore = None,
    allow_missing: p.AllowMissing = False,
    points: f.Points = None,
    task: f.Task = p.TaskName.segmentation,
    depth_scale: p.DepthScale = None,
    min_depth: f.MinDepth = 0.001,
    max_depth: f.MaxDepth = None,
    val_images: f.ValImages = None,
    val_labels: f.ValLabels = None,
    val_split: f.ValSplit = None,
    epochs: f.Epochs = None,
    lr: f.Rates = None,
    pixels: f.Pixels = None,
    flips: f.Flips = True,
    seed: f.Seed = 0,
    backbone: o.BackboneName = "embedded",
    layer: o.Layer = None,
    backbone_weights: o.BackboneWeights = None,
    views: o.Views = 1,
    upsampler: f.Upsamplers = None,
    head: o.Head = None,
    image_size: o.ImageSizeOption = None,
    device: o.Device = "auto",
    backend: o.Backend = o.BackendName.auto,
    precision: o.Precision = o.PrecisionName.fp32,
    workers: o.Workers = None,
    cache: f.Cache = None,
    cache_limit: f.CacheLimit = 20.0,
    memory: f.Memory = 4.0,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Fit a linear classifier of pixels (or depth) on the features of a frozen backbone.

    IMAGES and LABELS are two folders with matching names (nested or not), or IMAGES alone is the
    root of a data set: VOC, Cityscapes, ADE20K, COCO stuff maps, or images/ and labels/. Labels are
    indexed, grey or colour-coded pictures. What was found is shown before anything is computed.

        fmupsample probe fit images/ labels/ -o probe.safetensors --classes sky,road,car

        fmupsample probe fit VOC2012/ -o voc.safetensors --split train --val-split val

        fmupsample probe fit photos/ -o cat.safetensors --points clicks.json

    The classifier is fitted on low-resolution features and its result is upsampled, which is exact
    and needs no large map. Ctrl-C leaves nothing behind but the cache.
    """
    asked = SimpleNamespace(**locals())
    from fmupsample.images import ImageSize, find_images
    from fmupsample_cli.pictures import refuse_several
    from fmupsample_cli.progress import RichProgress, note

    refuse_several("probe fit")
    # What cannot work is said before torch and the models are loaded.
    inputs = [path for path in (points, Path(classes) if classes else None) if path]
    _check_output(output, overwrite, inputs)
    if image_size is not None:
        ImageSize.parse(image_size)
    methods = _methods(upsampler)
    _check_together(asked, len(methods))
    data = None if points is not None else _find_data(asked)
    asked.sources = [] if points is None else find_images([images])

    from fmupsample.probing.fit import save_config
    from fmupsample.probing.probe import save_probe
    from fmupsample.upsamplers import load_upsampler
    from fmupsample_cli.groups import PipelineOptions
    from fmupsample_cli.loading import open_pipeline

    asked.store = _store(cache, cache_limit, memory)
    models = PipelineOptions(
        backbone, layer, backbone_weights, views, methods[0] if methods else None, head,
        image_size, device=device, backend=backend, precision=precision, workers=workers,
    )  # fmt: skip
    pipeline = open_pipeline(models, quiet=quiet)
    others = [
        pipeline.with_upsampler(load_upsampler(pipeline.backbone, name)) for name in methods[1:]
    ]
    try:
        with RichProgress(quiet=quiet, unit="steps") as progress:
            fitted = _fit(asked, data, [pipeline, *others], progress)
    except KeyboardInterrupt:
        kept = "features that were made stay in the cache" if cache else "nothing was kept"
        note(f"stopped before the probe was complete; {kept}")
        raise
    save_probe(output, fitted.probe)
    beside = save_config(output, fitted.probe)
    _summarise(fitted, output, beside, json)


def _check_together(asked: SimpleNamespace, methods: int) -> None:
    """Raise a UsageError for options that exclude each other, or want others."""
    from fmupsample.errors import UsageError

    depth, points = asked.task is p.TaskName.depth, asked.points is not None
    if methods > 1 and (asked.head is not None or points):
        raise UsageError("several --upsampler are compared by held-out pictures: not with --head "
                         "or --points")  # fmt: skip
    if not depth and (asked.depth_scale is not None or asked.max_depth is not None):
        raise UsageError("--depth-scale and --max-depth are for --task depth")
    if depth and (points or asked.classes is not None or asked.ignore):
        raise UsageError("--points, --classes and --ignore are for --task segmentation")
    own = (asked.labels, asked.classes, asked.split, asked.val_images)
    if points and any(value is not None for value in own):
        raise UsageError("--points names pictures and classes itself: leave LABELS, --classes, "
                         "--split and --val-images away")  # fmt: skip
    if asked.val_labels is not None and asked.val_images is None and asked.val_split is None:
        raise UsageError("--val-labels needs --val-images")
    alone = asked.val_images is None and asked.split is None and asked.labels is None
    if asked.val_split is not None and alone:
        raise UsageError("--val-split val needs --split train: the rest is not to be seen")


class _Data(NamedTuple):
    """What there is to fit to: pairs, what a look at their labels found, and pairs to choose by."""

    dataset: Dataset
    found: Survey | DepthSurvey
    validation: Dataset | None


def _find_data(asked: SimpleNamespace) -> _Data:
    """Find and look at the labelled pictures, and say what was found."""
    from fmupsample.labels import open_dataset, parse_classes, parse_ignore, survey
    from fmupsample.labels.depth import survey_depth

    depth = asked.task is p.TaskName.depth
    ignored = parse_ignore(asked.ignore)
    given = None if asked.classes is None else parse_classes(asked.classes)
    layout = asked.layout and asked.layout.value
    layout = "folders" if depth and layout is None else layout
    found: Survey | DepthSurvey | None = None

    def look_at(what: str, *folders: Path | None, split: str | None) -> Dataset:
        nonlocal found
        dataset = open_dataset(
            *folders, split=split, layout=layout, allow_missing=asked.allow_missing
        )
        if depth:
            seen = survey_depth(dataset.pairs, _scale(asked))
            p.show_depths(dataset, seen, what=what, quiet=asked.quiet)
        else:
            known = {"given": given, "ignored": ignored} if found is None else {}
            seen = survey(dataset, found and found.table, **known)
            p.show_survey(dataset, seen, what=what, quiet=asked.quiet)
        found = found or seen
        return dataset

    dataset = look_at("training", asked.images, asked.labels, split=asked.split)
    if asked.val_images is None and asked.val_split is None:
        return _Data(dataset, found, None)
    where = (
        (asked.val_images, asked.val_labels) if asked.val_images else (asked.images, asked.labels)
    )
    return _Data(dataset, found, look_at("validation", *where, split=asked.val_split))


def _scale(asked: SimpleNamespace) -> float:
    from fmupsample.labels.depth import SCALE

    return SCALE if asked.depth_scale is None else asked.depth_scale


def _fit(
    asked: SimpleNamespace, data: _Data | None, pipelines: list[Pipeline], progress: Progress
) -> Fitted:
    """The probe, on the upsampler of the best of ``pipelines``."""
    from fmupsample.probing.cache import kernels_prefix
    from fmupsample.probing.fit import best_of, fit_classes, fit_depth, fit_points, options_for

    depth = asked.task is p.TaskName.depth
    drawn = (1024 if depth else 4096) if asked.pixels is None else asked.pixels or None
    chosen = {"rates": asked.lr, "epochs": asked.epochs, "pixels": drawn, "flips": asked.flips,
              "seed": asked.seed}  # fmt: skip
    card = {"data": asked.images.name, "command": _command()}
    shared = {"store": asked.store, "progress": progress, "card": card}
    if data is None:
        return fit_points(pipelines[0], asked.points, asked.sources, **chosen, **shared)
    shared |= {"options": options_for(len(data.dataset.pairs), **chosen)}
    shared |= {"dataset": data.dataset, "validation": data.validation}
    if depth:
        high = data.found.high if asked.max_depth is None else asked.max_depth
        fit = partial(fit_depth, high=high, low=asked.min_depth, scale=_scale(asked), **shared)
    else:
        fit = partial(fit_classes, table=data.found.table, **shared)
    if len(pipelines) == 1:
        return fit(pipelines[0])
    return best_of(
        pipelines,
        partial(fit, scored=True),
        lambda used: None if asked.cache else asked.store.forget(kernels_prefix(used)),
    )


def _methods(text: str | None) -> list[str]:
    """``"bilinear,resfu"`` -> both; a UsageError for one named twice, or for nothing."""
    from fmupsample.errors import UsageError

    names = [] if text is None else [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise UsageError(f"--upsampler {text!r}: give different names, with commas between them")
    return names


def _check_output(output: Path, overwrite: bool, inputs: list[Path]) -> None:
    """Before anything is computed: whether the probe and the file beside it can be written."""
    from fmupsample.errors import UsageError
    from fmupsample.images import printable

    if output.suffix != ".safetensors":
        raise UsageError(f"--output {printable(output)}: a probe is a .safetensors file")
    if output.is_dir():
        raise UsageError(f"--output {printable(output)} is a folder; name a file")
    beside = output.with_suffix(".json")
    for path in (output, beside):
        if path.exists() and not overwrite:
            raise UsageError(f"{printable(path)} exists: give another name, or --overwrite")
    if any(os.path.realpath(path) == os.path.realpath(beside) for path in inputs):
        raise UsageError(
            f"the configuration would be written over {printable(beside)}: give another --output"
        )
    p.check_writable(output.parent)


def _store(cache: Path | None, limit: float, memory: float) -> Any:
    from fmupsample.folders import cache_folder
    from fmupsample.probing.store import Store

    folder = cache or cache_folder() / "probing"
    return Store(0 if cache else int(memory * 1e9), folder, int(limit * 1e9))


def _command() -> str:
    from fmupsample_cli.train import _recipe

    return _recipe()


def _summarise(fitted: Fitted, output: Path, beside: Path, as_json: bool) -> None:
    from fmupsample.images import printable
    from fmupsample_cli.report import print_summary

    probe, fit = fitted.probe, fitted.fit
    # Of depth the score is the negative error, so that more is better.
    judged_by, sign = ("mIoU", 1) if probe.task == "segmentation" else ("relative error", -1)
    rows: dict[str, Any] = {"probe": printable(output), "configuration": printable(beside)}
    if probe.classes is not None:
        rows["classes"] = f"{len(probe.classes)}: {', '.join(probe.classes.names[:12])}"
    else:
        rows["depth"] = "{low:g} to {high:g} m; files of {scale:g} units a metre".format(
            **probe.depth
        )
    rows["pictures"] = f"{probe.card['pictures']}"
    rows["learning rate"] = f"{fit.rate:g}"
    if fit.held_out:
        scores = ", ".join(f"{rate:g}: {sign * score:.3f}" for rate, score in fit.held_out.items())
        rows[f"{judged_by} by rate"] = f"{scores} (on pictures that it was not fitted to)"
    for name, rates in probe.card.get("compared", {}).items():
        kept = " (kept)" if name == probe.upsampler["name"] else ""
        rows[f"{judged_by}, {name}"] = f"{sign * max(rates.values()):.3f}{kept}"
    rows["training loss"] = f"{fit.loss:.4f}"
    rows["time"] = f"{fitted.seconds['encode']:.1f} s features, {fitted.seconds['fit']:.1f} s fit"
    payload = {
        "probe": printable(output),
        "configuration": printable(beside),
        "task": probe.task,
        "classes": None if probe.classes is None else list(probe.classes.names),
        "depth": probe.depth,
        "backbone": probe.backbone,
        "upsampler": probe.upsampler,
        **probe.card,
    }
    print_summary("probe fit", rows, as_json=as_json, payload=payload)
