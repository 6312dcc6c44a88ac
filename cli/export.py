"""``fmupsample export``: backbone and upsampler as files for other runtimes."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fmupsample_cli.options import (
    RESULTS,
    BackboneName,
    BackboneWeights,
    Head,
    Json,
    Layer,
    Output,
    Overwrite,
    Quiet,
    UpsamplerName,
)

if TYPE_CHECKING:
    from fmupsample.exporting import Exported


class FormatName(StrEnum):
    """The kinds of files of :class:`fmupsample.exporting.Format`."""

    onnx = "onnx"
    pt2 = "pt2"


def export(
    output: Output,
    parts: Annotated[
        str,
        typer.Option(
            "--parts",
            metavar="LIST",
            help="What to export: fused (image -> upsampled features), backbone (image -> "
            "features), kernels (image, features -> weights), reassemble (weights, values -> "
            "upsampled values); several with commas.",
            rich_help_panel=RESULTS,
        ),
    ] = "fused",
    kind: Annotated[
        FormatName,
        typer.Option(
            "--format",
            help="ONNX, or what torch.export writes (for torch.export.load and AOTInductor).",
            rich_help_panel=RESULTS,
        ),
    ] = FormatName.onnx,
    opset: Annotated[
        int,
        typer.Option("--opset", min=17, max=18, help="Of ONNX.", rich_help_panel=RESULTS),
    ] = 18,
    dynamic: Annotated[
        str | None,
        typer.Option(
            "--dynamic",
            metavar="batch,size",
            help="What may differ from call to call; without it, the file is for one image of "
            "--image-size.",
            show_default=False,
            rich_help_panel=RESULTS,
        ),
    ] = None,
    channels: Annotated[
        int | None,
        typer.Option(
            "--channels",
            min=1,
            metavar="V",
            help="Channels of the values that reassemble takes. Default: those of the features.",
            show_default=False,
            rich_help_panel=RESULTS,
        ),
    ] = None,
    image_size: Annotated[
        str | None,
        typer.Option(
            "--image-size",
            metavar="N|HxW",
            help="Size of the image in pixels. Default: what suits the model.",
            show_default=False,
        ),
    ] = None,
    backbone: BackboneName = "embedded",
    layer: Layer = None,
    backbone_weights: BackboneWeights = None,
    upsampler: UpsamplerName = None,
    head: Head = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write backbone and upsampler as ONNX or torch.export files, for other runtimes.

    Every file is run and compared with the library; one that differs by more than 0.001 of the
    result's range is not kept. Beside each is a short script that uses it. ONNX needs
    `pip install 'fmupsample[export]'`.

        fmupsample export -o model/

        fmupsample export -o model/ --parts backbone,kernels,reassemble --dynamic batch
    """
    from fmupsample.exporting import Format, export_all, require_onnx
    from fmupsample.images import printable
    from fmupsample_cli.loading import load_models
    from fmupsample_cli.report import print_json, print_table

    wanted, free = _words(parts), _words(dynamic or "")
    size = None if image_size is None else _size(image_size)
    if kind is FormatName.onnx:
        require_onnx()
    model, method = load_models(
        backbone, layer, backbone_weights, upsampler, head, "cpu", image_size=size, quiet=quiet
    )
    files = export_all(
        model,
        method,
        output,
        wanted,
        size=size,
        kind=Format(kind),
        opset=opset,
        dynamic=free,
        channels=channels,
        overwrite=overwrite,
    )
    if as_json:
        print_json({"files": [_facts(file) for file in files]})
        return
    rows = [
        [
            printable(file.path),
            f"{file.difference:.1e}",
            ", ".join(f"{name} {shape}" for name, shape in file.shapes.items()),
            file.script.name,
        ]
        for file in files
    ]
    columns = ["file", "difference", "inputs and result", "script"]
    print_table(columns, rows, title="exported; differences are relative to the result's range")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _size(text: str) -> tuple[int, int]:
    """``(H, W)``; one number is a square."""
    from fmupsample.errors import UsageError
    from fmupsample.images import ImageSize

    size = ImageSize.parse(text)
    if size.exact is None and size.short is None:
        raise UsageError("--image-size: an exported file has a size in pixels, not native")
    return size.exact or (size.short, size.short)


def _facts(file: Exported) -> dict[str, Any]:
    return {
        "path": str(file.path),
        "script": str(file.script),
        "difference": file.difference,
        "shapes": file.shapes,
    }
