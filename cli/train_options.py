"""The options of ``fmupsample train``, and what is read out of their texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fmupsample.upsamplers.registry import Needs, any_backbone_names, either, learned_names
from fmupsample_cli import options as o

TRAINING = "Training"


def _option(*names: str, panel: str, help: str, metavar: str | None = None, **more: Any) -> Any:
    return typer.Option(
        *names, metavar=metavar, help=help, rich_help_panel=panel, show_default=False, **more
    )


HeadOutput = Annotated[
    Path,
    _option("--output", "-o", metavar="FILE", panel=o.RESULTS,
            help="The head file (.safetensors); appears when training is complete."),
]  # fmt: skip
Upsampler = Annotated[
    str | None,
    _option("--upsampler", metavar="NAME", panel=o.MODEL, autocompletion=o.complete_upsampler,
            help=f"Which upsampler to train: {either(any_backbone_names())} (for any backbone), "
            f"{either(learned_names(Needs.OWN_HEAD))}. Default: bilateral-cells, for this "
            "backbone."),
]  # fmt: skip
Also = Annotated[
    list[str] | None,
    _option("--also", metavar="NAME[,layer=N][,weights=FILE]", panel=o.MODEL,
            help=f"A further backbone, for --upsampler {either(any_backbone_names())}; they take "
            "turns. May be repeated."),
]  # fmt: skip
StartFrom = Annotated[
    Path | None,
    _option("--from", metavar="HEAD", panel=o.MODEL,
            help="Start from this head instead of new parameters: a file of the same backbone, or "
            "affinity or bilateral-cells, the shipped heads for any."),
]  # fmt: skip
Validation = Annotated[
    list[str] | None,
    _option("--val", metavar="IMAGES", panel=o.PICTURES,
            help="Pictures or a folder to validate on; may be repeated. Default: a twentieth of "
            "the pictures is held out."),
]  # fmt: skip
Masks = Annotated[
    list[str] | None,
    _option("--masks", metavar="FOLDER[=WEIGHT]", panel=o.PICTURES,
            help="Indexed PNGs of the pictures' names, of any classes, for --objective masks, "
            "which is then the default; pictures without one teach nothing by it. May be "
            "repeated."),
]  # fmt: skip
CropSize = Annotated[
    str | None,
    _option("--image-size", metavar="N[,N...]", panel=o.PICTURES,
            help="Side of the crops the model sees, pixels; several take turns. Default: 224."),
]  # fmt: skip
Steps = Annotated[
    int | None,
    _option("--steps", min=1, metavar="N", panel=TRAINING,
            help="How many. Default: 2000 on a GPU, 400 on the CPU."),
]  # fmt: skip
BatchSize = Annotated[
    int | None,
    _option("--batch-size", min=1, metavar="N", panel=TRAINING,
            help="Crops a step, in each process. Default: 8 on a GPU, 2 on the CPU."),
]  # fmt: skip
LearningRate = Annotated[
    float | None,
    _option("--lr", metavar="X", panel=TRAINING, help="Peak learning rate. Default: 0.001."),
]
Seed = Annotated[
    int | None,
    _option("--seed", min=0, metavar="N", panel=TRAINING,
            help="The same seed gives the same head. Default: 0."),
]  # fmt: skip
ObjectiveOption = Annotated[
    str | None,
    _option("--objective", metavar="TERM[=WEIGHT],...", panel=TRAINING,
            help="What to train for, of clusters, crops, masks. Default: clusters; with --masks, "
            "masks."),
]  # fmt: skip
MoreOptions = Annotated[
    str | None,
    _option("--config", metavar="FILE|JSON", panel=TRAINING,
            help="More options as JSON, such as the config.json of an earlier run; options on the "
            "command line go before it."),
]  # fmt: skip
Resume = Annotated[
    bool,
    _option("--resume", panel=TRAINING,
            help="Go on with an interrupted run; it ends as if it had not been interrupted."),
]  # fmt: skip
Work = Annotated[
    Path | None,
    _option("--work", metavar="FOLDER", panel=o.RESULTS,
            help="Folder for checkpoint, log, curve and previews. Default: FILE.train beside the "
            "head."),
]  # fmt: skip
Overwrite = Annotated[
    bool,
    _option("--overwrite", panel=o.RESULTS, help="Train anew, whatever an earlier run left."),
]
Precision = Annotated[
    o.PrecisionName | None,
    _option("--precision", panel=o.COMPUTE, parser=o.number_format_of(o.PrecisionName),
            metavar="fp32|bf16|fp16",
            help="Arithmetic of the model. Default: bf16 on a GPU that has it, else fp32."),
]  # fmt: skip


def parse_sizes(text: str) -> list[int]:
    """``"168,224"`` -> the sides of crops."""
    from fmupsample.errors import UsageError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(
            f"image size {text!r} is not understood: give a number of pixels, or several: 168,224"
        ) from None


def parse_masks(text: str) -> tuple[Path, float]:
    """``"folder=0.5"`` -> the folder and what its masks count."""
    from fmupsample.errors import UsageError

    folder, equals, weight = text.rpartition("=")
    if not equals or Path(text).is_dir():
        return Path(text), 1.0
    try:
        value = float(weight)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UsageError(f"--masks {text!r} is not understood: give FOLDER, or FOLDER=0.5")
    return Path(folder), value


def parse_backbone(text: str) -> dict[str, Any]:
    """``"name,layer=5,weights=file"`` -> what :func:`load_backbone` takes."""
    from fmupsample.errors import UsageError

    name, *rest = text.split(",")
    found: dict[str, Any] = {"name": name}
    for part in rest:
        key, equals, value = part.partition("=")
        if key not in ("layer", "weights") or not equals:
            raise UsageError(
                f"--also {text!r} is not understood: give NAME, or NAME,layer=N,weights=FILE"
            )
        found[key] = value
    return found
