"""``fmupsample probe fit``: a linear probe from labelled pictures."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fmupsample_cli import options as o
from fmupsample_cli import probe_options as p

if TYPE_CHECKING:
    from fmupsample.probing.fit import Fitted

ProbeOutput = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="The probe (.safetensors); its configuration goes into a .json beside it.",
        show_default=False,
        rich_help_panel=o.RESULTS,
    ),
]
Classes = Annotated[
    str | None,
    typer.Option(
        "--classes",
        metavar="NAMES|FILE",
        help="Names in the order of the values (sky,road,...), or a JSON, CSV or text file with "
        "names, values and colours.",
        show_default=False,
        rich_help_panel=p.LABELS,
    ),
]
Points = Annotated[
    Path | None,
    typer.Option(
        "--points",
        metavar="FILE",
        help="JSON with clicks on some of the pictures, instead of LABELS.",
        show_default=False,
        rich_help_panel=p.LABELS,
    ),
]
Task = Annotated[
    p.TaskName,
    typer.Option("--task", help="What LABELS hold: classes or depths.", rich_help_panel=p.LABELS),
]
MinDepth = Annotated[
    float,
    typer.Option(
        "--min-depth",
        metavar="M",
        help="Depth: the nearest bin, metres.",
        rich_help_panel=p.LABELS,
    ),
]
MaxDepth = Annotated[
    float | None,
    typer.Option(
        "--max-depth",
        metavar="M",
        help="Depth: the farthest bin; what is beyond does not count. Default: the largest found.",
        show_default=False,
        rich_help_panel=p.LABELS,
    ),
]
ValImages = Annotated[
    Path | None,
    typer.Option(
        "--val-images",
        metavar="FOLDER",
        help="Pictures by which the learning rate is chosen. Default: a tenth is held out.",
        show_default=False,
        rich_help_panel=p.FITTING,
    ),
]
ValLabels = Annotated[
    Path | None,
    typer.Option(
        "--val-labels",
        metavar="FOLDER",
        help="Their labels.",
        show_default=False,
        rich_help_panel=p.FITTING,
    ),
]
ValSplit = Annotated[
    str | None,
    typer.Option(
        "--val-split",
        metavar="NAME|FILE",
        help="The split they are; alone, of the same folders.",
        show_default=False,
        rich_help_panel=p.FITTING,
    ),
]
Epochs = Annotated[
    int | None,
    typer.Option(
        "--epochs",
        min=1,
        metavar="N",
        help="Passes over the pictures. Default: 20; 300 steps for 8 pictures or fewer.",
        show_default=False,
        rich_help_panel=p.FITTING,
    ),
]
Rates = Annotated[
    list[float] | None,
    typer.Option(
        "--lr",
        metavar="X",
        help="Learning rate; several are fitted in one pass and the best is kept. Default: 0.01, "
        "0.03, 0.1 and 0.3; 0.03 for 8 pictures or fewer, 0.002 for clicks.",
        show_default=False,
        rich_help_panel=p.FITTING,
    ),
]
Pixels = Annotated[
    int | None,
    typer.Option(
        "--pixels",
        min=0,
        metavar="N",
        help="Drawn anew from each picture in every step; 0 takes all. Default: 4096, for depth "
        "1024.",
        show_default=False,
        rich_help_panel=p.FITTING,
    ),
]
Flips = Annotated[
    bool,
    typer.Option(
        "--flips/--no-flips",
        help="Show half of the pictures mirrored.",
        rich_help_panel=p.FITTING,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        min=0,
        metavar="N",
        help="The same seed gives the same probe.",
        rich_help_panel=p.FITTING,
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        metavar="FOLDER",
        help="Keep features and kernel weights in this folder, for this run and later ones. "
        "Default: in memory, and beyond --memory in fmupsample's cache folder.",
        show_default=False,
        rich_help_panel=o.COMPUTE,
    ),
]
CacheLimit = Annotated[
    float,
    typer.Option(
        "--cache-limit",
        min=0.001,
        metavar="GB",
        help="The most they may take on disk.",
        rich_help_panel=o.COMPUTE,
    ),
]
Memory = Annotated[
    float,
    typer.Option(
        "--memory",
        min=0.0,
        metavar="GB",
        help="The most they may take in memory.",
        rich_help_panel=o.COMPUTE,
    ),
]


Upsamplers = Annotated[
    str | None,
    typer.Option(
        "--upsampler",
        metavar="NAME,...",
        help="Method: bilinear, jbu, affinity, ... (`fmupsample models --upsamplers`). "
        "Several (bilinear,resfu) are fitted on the same features and the best is kept.",
        autocompletion=o.complete_upsampler,
        show_default=False,
        rich_help_panel=o.MODEL,
    ),
]


def fit(
    images: p.ImagesFolder,
    labels: p.LabelsFolder = None,
    output: ProbeOutput = ...,
    layout: p.Layout = None,
    split: p.Split = None,
    classes: Classes = None,
    ignore: p.Ignore = None,
    allow_missing: p.AllowMissing = False,
    points: Points = None,
    task: Task = p.TaskName.segmentation,
    depth_scale: p.DepthScale = None,
    min_depth: MinDepth = 0.001,
    max_depth: MaxDepth = None,
    val_images: ValImages = None,
    val_labels: ValLabels = None,
    val_split: ValSplit = None,
    epochs: Epochs = None,
    lr: Rates = None,
    pixels: Pixels = None,
    flips: Flips = True,
    seed: Seed = 0,
    backbone: o.BackboneName = "embedded",
    layer: o.Layer = None,
    backbone_weights: o.BackboneWeights = None,
    views: o.Views = 1,
    upsampler: Upsamplers = None,
    head: o.Head = None,
    image_size: o.ImageSizeOption = None,
    device: o.Device = "auto",
    backend: o.Backend = o.BackendName.auto,
    precision: o.Precision = o.PrecisionName.fp32,
    workers: o.Workers = None,
    cache: Cache = None,
    cache_limit: CacheLimit = 20.0,
    memory: Memory = 4.0,
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
    from fmupsample.errors import UsageError
    from fmupsample.images import ImageSize, find_images
    from fmupsample.labels import open_dataset, parse_classes, parse_ignore, survey
    from fmupsample.labels.depth import SCALE, survey_depth
    from fmupsample_cli.pictures import refuse_several
    from fmupsample_cli.progress import RichProgress, note

    refuse_several("probe fit")
    # What cannot work is said before torch and the models are loaded.
    inputs = [path for path in (points, Path(classes) if classes else None) if path]
    _check_output(output, overwrite, inputs)
    size = None if image_size is None else ImageSize.parse(image_size)
    ignored = parse_ignore(ignore)
    given = None if classes is None else parse_classes(classes)
    chosen = "folders" if layout is None and task is p.TaskName.depth else layout and layout.value
    dataset = found = validation = None
    depth = task is p.TaskName.depth
    methods = _methods(upsampler)
    if len(methods) > 1 and (head is not None or points is not None):
        raise UsageError("several --upsampler are compared by held-out pictures: not with --head "
                         "or --points")  # fmt: skip
    if not depth and (depth_scale is not None or max_depth is not None):
        raise UsageError("--depth-scale and --max-depth are for --task depth")
    scale = SCALE if depth_scale is None else depth_scale
    if depth and (points is not None or given is not None or ignored is not None):
        raise UsageError("--points, --classes and --ignore are for --task segmentation")
    if points is not None:
        if labels is not None or given is not None or split is not None or val_images is not None:
            raise UsageError("--points names pictures and classes itself: leave LABELS, --classes, "
                             "--split and --val-images away")  # fmt: skip
        sources = find_images([images])
    else:
        ways = {"layout": chosen, "allow_missing": allow_missing}
        dataset = open_dataset(images, labels, split=split, **ways)
        if depth:
            found = survey_depth(dataset.pairs, scale)
            p.show_depths(dataset, found, what="training", quiet=quiet)
        else:
            found = survey(dataset, given=given, ignored=ignored)
            p.show_survey(dataset, found, what="training", quiet=quiet)
        if val_images is not None or val_split is not None:
            if val_images is None and split is None and labels is None:
                raise UsageError("--val-split val needs --split train: the rest is not to be seen")
            where = (val_images, val_labels) if val_images else (images, labels)
            validation = open_dataset(*where, split=val_split, **ways)
            if depth:
                seen = survey_depth(validation.pairs, scale)
                p.show_depths(validation, seen, what="validation", quiet=quiet)
            else:
                seen = survey(validation, found.table)
                p.show_survey(validation, seen, what="validation", quiet=quiet)
        elif val_labels is not None:
            raise UsageError("--val-labels needs --val-images")

    from fmupsample.probing.cache import kernels_prefix
    from fmupsample.probing.fit import (
        best_of,
        fit_classes,
        fit_depth,
        fit_points,
        options_for,
        save_config,
    )
    from fmupsample.probing.probe import save_probe
    from fmupsample.upsamplers import load_upsampler
    from fmupsample_cli.loading import open_pipeline

    store = _store(cache, cache_limit, memory)
    pipeline = open_pipeline(
        backbone,
        layer,
        backbone_weights,
        methods[0] if methods else None,
        head,
        device,
        image_size=size,
        fit="resize",
        precision=precision.value,
        backend=backend.value,
        batch_size=None,
        workers=workers,
        quiet=quiet,
        views=views,
    )
    others = [
        pipeline.with_upsampler(load_upsampler(pipeline.backbone, name)) for name in methods[1:]
    ]
    drawn = (1024 if depth else 4096) if pixels is None else pixels or None
    more = {"pixels": drawn, "flips": flips, "seed": seed}
    shared = {"store": store, "card": {"data": images.name, "command": _command()}}
    try:
        with RichProgress(quiet=quiet, unit="steps") as progress:
            if points is not None:
                fitted = fit_points(
                    pipeline, points, sources, rates=lr, epochs=epochs, progress=progress,
                    **more, **shared,
                )  # fmt: skip
            else:
                options = options_for(len(dataset.pairs), rates=lr, epochs=epochs, **more)
                shared |= {"validation": validation, "progress": progress}
                if depth:
                    high = found.high if max_depth is None else max_depth
                    train = partial(
                        fit_depth, dataset=dataset, high=high, options=options, low=min_depth,
                        scale=scale, **shared,
                    )  # fmt: skip
                else:
                    train = partial(
                        fit_classes, dataset=dataset, table=found.table, options=options, **shared
                    )
                if len(methods) > 1:
                    fitted = best_of(
                        [pipeline, *others],
                        partial(train, scored=True),
                        lambda used: None if cache else store.forget(kernels_prefix(used)),
                    )
                else:
                    fitted = train(pipeline)
    except KeyboardInterrupt:
        kept = "features that were made stay in the cache" if cache else "nothing was kept"
        note(f"stopped before the probe was complete; {kept}")
        raise
    save_probe(output, fitted.probe)
    beside = save_config(output, fitted.probe)
    _summarise(fitted, output, beside, json)


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
