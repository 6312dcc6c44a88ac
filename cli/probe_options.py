"""Options that the commands of ``fmupsample probe`` share."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fmupsample_cli import options as o

if TYPE_CHECKING:
    from fmupsample.labels import Dataset, Survey
    from fmupsample.labels.depth import DepthSurvey
    from fmupsample.pipeline import Pipeline
    from fmupsample.probing.probe import Probe

LABELS = "Labels"
FITTING = "Fitting"
_LITTLE = 0.3  # metres; class numbers read as millimetres end here


class LayoutName(StrEnum):
    """The words of :data:`fmupsample.labels.LAYOUTS`."""

    voc = "voc"
    cityscapes = "cityscapes"
    ade20k = "ade20k"
    coco = "coco"
    folders = "folders"


class TaskName(StrEnum):
    """What a probe is for."""

    segmentation = "segmentation"
    depth = "depth"


ImagesFolder = Annotated[
    Path,
    typer.Argument(
        metavar="IMAGES",
        help="Folder of the pictures, or the root of a data set that holds both.",
        show_default=False,
    ),
]
LabelsFolder = Annotated[
    Path | None,
    typer.Argument(metavar="[LABELS]", help="Folder of their labels.", show_default=False),
]
ProbeFile = Annotated[
    Path, typer.Argument(metavar="PROBE", help="A file made by `probe fit`.", show_default=False)
]
Layout = Annotated[
    LayoutName | None,
    typer.Option(
        "--layout",
        help="How the data lie. Default: found out, and said.",
        show_default=False,
        rich_help_panel=LABELS,
    ),
]
Split = Annotated[
    str | None,
    typer.Option(
        "--split",
        metavar="NAME|FILE",
        help="A split of the data set (train, val), or a file with a name a line.",
        show_default=False,
        rich_help_panel=LABELS,
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore",
        metavar="N,...",
        help="Label values (or '#rrggbb') that do not count, or none. Default: 255, and what the "
        "layout says.",
        show_default=False,
        rich_help_panel=LABELS,
    ),
]
AllowMissing = Annotated[
    bool,
    typer.Option(
        "--allow-missing",
        help="Leave out pictures without labels instead of stopping.",
        rich_help_panel=LABELS,
    ),
]
DepthScale = Annotated[
    float | None,
    typer.Option(
        "--depth-scale",
        min=1e-6,
        metavar="N",
        help="Units a metre in 16-bit depth files: 1000 (NYU, most cameras) or 256 (KITTI). "
        "Default: 1000; npy files hold metres.",
        show_default=False,
        rich_help_panel=LABELS,
    ),
]
# Of models, where the probe itself says which: only to check, or where it cannot be known.
OtherBackbone = Annotated[
    str | None,
    typer.Option(
        "--backbone",
        "-b",
        metavar="NAME",
        help="Default: the one the probe was fitted on; another is refused.",
        show_default=False,
        rich_help_panel=o.MODEL,
    ),
]
OtherViews = Annotated[
    int | None,
    typer.Option(
        "--views",
        metavar="1|2|4|9",
        callback=o.check_views,
        help="Default: as many as the probe was fitted with; another number is refused.",
        show_default=False,
        rich_help_panel=o.MODEL,
    ),
]
ImageSizeOption = Annotated[
    str | None,
    typer.Option(
        "--image-size",
        metavar="N|HxW|native",
        help="Size the model sees. Default: the one the probe was fitted with.",
        show_default=False,
        rich_help_panel=o.PICTURES,
    ),
]
PrecisionOption = Annotated[
    o.PrecisionName | None,
    typer.Option(
        "--precision",
        parser=o.number_format_of(o.PrecisionName),
        metavar="fp32|bf16|fp16",
        help="Arithmetic of the model. Default: as the probe was fitted.",
        show_default=False,
        rich_help_panel=o.COMPUTE,
    ),
]


def check_writable(folder: Path) -> None:
    """Raise an OutputError if ``folder`` is not there and cannot be made, or cannot be written."""
    from fmupsample.errors import OutputError
    from fmupsample.images import printable

    there = next((p for p in (folder, *folder.absolute().parents) if p.exists()), folder)
    if not there.is_dir():
        raise OutputError(f"{printable(there)} is in the way: it is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(f"{printable(folder)} cannot be written: permission denied")


def show_survey(dataset: Dataset, found: Survey, *, what: str, quiet: bool) -> None:
    """What was found, on standard error, before anything is computed."""
    if quiet:
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from fmupsample.labels.surveys import sizes_text
    from fmupsample_cli.progress import console

    ignored = found.pixels[-1] / max(1, found.pixels.sum())
    console.print(
        Text(
            f"{what}: {len(dataset.pairs)} pairs (layout {dataset.layout}), "
            f"{len(dataset.missing)} pictures without labels, {len(dataset.orphans)} labels "
            f"without picture; sizes {sizes_text(found.sizes)}; {ignored:.1%} of the pixels ignored"
        ),
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE)
    for name in ("class", "value", "pixels", "pictures"):
        table.add_column(name, justify="left" if name == "class" else "right")
    rows = found.rows()
    shown = rows if len(rows) <= 40 else sorted(rows, key=lambda r: -r[3])[:40]
    for name, value, share, pictures in shown:
        table.add_row(Text(name), value, share, str(pictures))
    console.print(table)
    if len(shown) < len(rows):
        console.print(Text(f"and {len(rows) - len(shown)} classes in fewer pictures"))


def show_depths(dataset: Dataset, found: DepthSurvey, *, what: str, quiet: bool) -> None:
    """The same for depth files."""
    from fmupsample_cli.progress import note, warn

    sizes = ", ".join(f"{w}x{h} ({n})" for (h, w), n in list(found.sizes.items())[:3])
    note(
        f"{what}: {len(dataset.pairs)} pairs, {len(dataset.missing)} pictures without depths; "
        f"sizes {sizes}; {found.low:.3g} to {found.high:.3g} m, median {found.median:.3g} m, known "
        f"at {found.known:.1%} of the pixels",
        quiet=quiet,
    )
    if found.high < _LITTLE:
        warn(
            f"no distance is beyond {found.high:.3g} m: are these depths, and is --depth-scale "
            "right?"
        )


def open_for_probe(
    probe: Probe,
    *,
    backbone: str | None,
    weights: Path | None,
    views: int | None,
    head: Path | None,
    device: str,
    image_size: str | None,
    precision: o.PrecisionName | None,
    backend: str,
    batch_size: int | None,
    workers: int | None,
    quiet: bool,
) -> Pipeline:
    """The pipeline whose features the probe was fitted on; refuses any other."""
    from fmupsample.errors import ProbeError
    from fmupsample_cli.groups import PipelineOptions
    from fmupsample_cli.loading import open_pipeline

    if probe.needs_weights and weights is None:
        raise ProbeError(
            f"this probe was fitted on {probe.backbone['name']}, whose weights came from a file: "
            "name it with --backbone-weights"
        )
    models = PipelineOptions(
        backbone or probe.loadable_backbone,
        str(probe.backbone["layer"]),
        weights,
        probe.views if views is None else views,
        None if head is not None else str(probe.upsampler["name"]),
        head,
        image_size or probe.pictures["image_size"],
        o.FitMode(probe.pictures["fit"]),
        device,
        o.BackendName(backend),
        precision or o.PrecisionName(probe.pictures["precision"]),
        batch_size,
        workers,
    )
    pipeline = open_pipeline(models, quiet=quiet)
    probe.check(pipeline)
    return pipeline
