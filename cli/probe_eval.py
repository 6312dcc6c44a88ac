"""``fmupsample probe eval``: how good a probe is on labelled pictures."""

from __future__ import annotations

from collections.abc import Callable
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fmupsample_cli import options as o
from fmupsample_cli import probe_options as p

if TYPE_CHECKING:
    from fmupsample.labels import Dataset
    from fmupsample.pipeline import Pipeline
    from fmupsample.probing.probe import Probe
    from fmupsample.progress import Progress

    Judge = Callable[[Pipeline, Progress], dict[str, Any]]

Tolerance = Annotated[
    float,
    typer.Option(
        "--tolerance",
        min=1e-6,
        metavar="X",
        help="How far a contour may be off in boundary F: pixels from 1 on, below that a share of "
        "the diagonal.",
        rich_help_panel=p.LABELS,
    ),
]
ReportFolder = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FOLDER",
        help="Also write metrics.json and confusion.png there.",
        show_default=False,
        rich_help_panel=o.RESULTS,
    ),
]


def evaluate(
    probe: p.ProbeFile,
    images: p.ImagesFolder,
    labels: p.LabelsFolder = None,
    output: ReportFolder = None,
    layout: p.Layout = None,
    split: p.Split = None,
    ignore: p.Ignore = None,
    allow_missing: p.AllowMissing = False,
    depth_scale: p.DepthScale = None,
    tolerance: Tolerance = 0.0075,
    backbone: p.OtherBackbone = None,
    backbone_weights: o.BackboneWeights = None,
    views: p.OtherViews = None,
    head: o.Head = None,
    image_size: p.ImageSizeOption = None,
    device: o.Device = "auto",
    backend: o.Backend = o.BackendName.auto,
    precision: p.PrecisionOption = None,
    batch_size: o.BatchSize = None,
    workers: o.Workers = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Judge a probe on labelled pictures: IoU, pixel accuracy, boundary F; for depth delta1-3,
    relative error and RMSE.

        fmupsample probe eval probe.safetensors val/images/ val/labels/ -o report/

    mIoU is that of one confusion matrix over all pictures, at the labels' own pixels. Boundary F
    matches contours within --tolerance, per picture and class, as DAVIS does.
    """
    from fmupsample.errors import UsageError
    from fmupsample.folders import holds_keys, refuse_others_files
    from fmupsample.labels import open_dataset, parse_ignore
    from fmupsample.probing.probe import load_probe
    from fmupsample_cli.pictures import refuse_several
    from fmupsample_cli.progress import RichProgress
    from fmupsample_cli.report import print_json, print_summary

    refuse_several("probe eval")
    if output is not None:
        p.check_writable(output)
        refuse_others_files(
            output, ("metrics.json", "confusion.png"),
            ours=holds_keys(output / "metrics.json", "probe", "pictures"),
            instead="choose another folder with --output",
        )  # fmt: skip
    ignored = parse_ignore(ignore)
    fitted = load_probe(probe)
    depth = fitted.task == "depth"
    if not depth and depth_scale is not None:
        raise UsageError("--depth-scale is for depth probes; this one is of classes")
    chosen = "folders" if layout is None and depth else layout and layout.value
    dataset = open_dataset(images, labels, layout=chosen, split=split, allow_missing=allow_missing)
    if depth:
        judge = _depth_judge(fitted, dataset, depth_scale, quiet)
    else:
        judge = _class_judge(fitted, dataset, ignored, tolerance, quiet)
    pipeline = p.open_for_probe(
        fitted,
        backbone=backbone,
        weights=backbone_weights,
        views=views,
        head=head,
        device=device,
        image_size=image_size,
        precision=precision,
        backend=backend.value,
        batch_size=batch_size,
        workers=workers,
        quiet=quiet,
    )
    payload = {
        "probe": str(probe),
        "task": fitted.task,
        "pictures": len(dataset.pairs),
        "layout": dataset.layout,
        "image_size": str(pipeline.image_size),
        "backbone": fitted.backbone["name"],
        "upsampler": fitted.upsampler["name"],
    }
    with RichProgress(quiet=quiet) as progress:
        metrics = judge(pipeline, progress)
    payload |= metrics
    if output is not None:
        _write(output, fitted, payload)
    if depth:
        rows = {name: f"{value:.4f}" for name, value in metrics.items()}
        print_summary("probe eval", rows, as_json=json, payload=payload)
    elif json:
        print_json(payload)
    else:
        _show(payload)


def _class_judge(
    probe: Probe, dataset: Dataset, ignored: tuple[int, ...] | None, tolerance: float, quiet: bool
) -> Judge:
    """Look at the labels now, and measure when there is a pipeline."""
    from fmupsample.labels import survey
    from fmupsample.probing.evaluate import evaluate, report, table_for

    found = survey(dataset, table_for(probe, dataset), ignored=ignored)
    p.show_survey(dataset, found, what="judging", quiet=quiet)

    def judge(pipeline: Pipeline, progress: Progress) -> dict[str, Any]:
        more = {"tolerance": tolerance, "progress": progress}
        return report(evaluate(probe, pipeline, dataset, found.table, **more), found.table)

    return judge


def _depth_judge(probe: Probe, dataset: Dataset, scale: float | None, quiet: bool) -> Judge:
    """The same for depths."""
    from fmupsample.labels.depth import survey_depth
    from fmupsample.probing.evaluate import evaluate_depth

    units = scale or probe.depth["scale"]
    p.show_depths(dataset, survey_depth(dataset.pairs, units), what="judging", quiet=quiet)

    def judge(pipeline: Pipeline, progress: Progress) -> dict[str, Any]:
        errors = evaluate_depth(probe, pipeline, dataset, units, progress)
        return {name: round(value, 6) for name, value in errors.summary().items()}

    return judge


def _write(output: Path, probe: Probe, payload: dict[str, Any]) -> None:
    """``metrics.json``, and of classes ``confusion.png``, whose path goes into ``payload``."""
    import numpy as np

    from fmupsample.draw.classes import draw_confusion
    from fmupsample.formats.pictures import png
    from fmupsample_cli.report import save_files

    files = {"metrics.json": (dumps(payload, indent=1) + "\n").encode()}
    if probe.classes is not None:
        picture = draw_confusion(np.array(payload["confusion"]), probe.classes.names)
        files["confusion.png"] = png(picture)
        payload["confusion_picture"] = str(output / "confusion.png")
    save_files(output, files)


def _show(payload: dict[str, Any]) -> None:
    from fmupsample_cli.report import print_table

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    counts = [sum(row) for row in payload["confusion"]]
    shares = [count / sum(counts) for count in counts]
    rows = [
        (name, percent(iou), percent(payload["boundary_f_per_class"][name]), f"{100 * of:.2f}")
        for (name, iou), of in zip(payload["iou"].items(), shares, strict=True)
    ]
    rows.append(("mean", percent(payload["miou"]), percent(payload["boundary_f"]), ""))
    limit = payload["boundary_tolerance"]
    shown = f"{round(limit)} px" if limit >= 1 else f"{limit:.2%} of the diagonal"
    print_table(
        ["class", "IoU", "boundary F", "% of pixels"],
        rows,
        title=f"probe eval: {payload['pictures']} pictures, {payload['backbone']}, "
        f"{payload['upsampler']}",
        right=["IoU", "boundary F", "% of pixels"],
    )
    print(
        f"  mIoU {percent(payload['miou'])}, pixel accuracy {percent(payload['pixel_accuracy'])}, "
        f"mIoU within {payload['band']} px of edges {percent(payload['band_miou'])}, boundary F "
        f"{percent(payload['boundary_f'])} (tolerance {shown})"
    )
    if "confusion_picture" in payload:
        print(f"  confusion matrix: {payload['confusion_picture']}")
