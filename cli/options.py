"""Options that several commands share, so that they mean and read the same everywhere.

Use them as annotations and give the default in the signature::

    def extract(images: Images, output: Output, backbone: BackboneName = "embedded", ...)
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fmupsample.number_formats import number_format
from fmupsample.upsamplers.registry import upsampler_names

MODEL = "Model"
PICTURES = "Pictures"
COMPUTE = "Compute"
RESULTS = "Results"


class FitMode(StrEnum):
    """How a picture is brought to the model's patch grid."""

    resize = "resize"
    pad = "pad"


class PrecisionName(StrEnum):
    """Number format of the model's arithmetic."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def number_format_of(kind: type[StrEnum]) -> Callable[[str], StrEnum]:
    """What reads a word as one of ``kind``, by PyTorch's names as well (``float16``, ``half``)."""

    def read(text: str) -> StrEnum:
        try:
            return kind(number_format(text))
        except ValueError:
            raise typer.BadParameter(f"{text!r} is not one of {', '.join(kind)}") from None

    return read


class BackendName(StrEnum):
    """What computes the operators; the words of :data:`fmupsample.ops.backend.BACKENDS`."""

    auto = "auto"
    cuda = "cuda"
    torch = "torch"


def _complete_backbone(incomplete: str) -> list[str]:
    from fmupsample.backbones.aliases import ALIASES

    return [name for name in ("embedded", *ALIASES) if name.startswith(incomplete)]


def complete_upsampler(incomplete: str) -> list[str]:
    return [name for name in upsampler_names() if name.startswith(incomplete)]


# --- what goes in ---------------------------------------------------------------------------------
Images = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="IMAGES...",
        help="Pictures, folders (searched recursively) or quoted globs such as 'photos/*.jpg'.",
        show_default=False,
    ),
]
ListFile = Annotated[
    Path | None,
    typer.Option(
        "--list",
        metavar="FILE",
        help="Text file with one picture per line; - reads standard input.",
        rich_help_panel=PICTURES,
    ),
]
ImageSizeOption = Annotated[
    str | None,
    typer.Option(
        "--image-size",
        metavar="N|HxW|native",
        help="Size the model sees: N pixels for the short side, exactly HxW, or native. "
        "Default: what suits the model.",
        show_default=False,
        rich_help_panel=PICTURES,
    ),
]
Fit = Annotated[
    FitMode,
    typer.Option(
        "--fit",
        help="Reach the patch grid by a tiny resize or by padding right and bottom.",
        rich_help_panel=PICTURES,
    ),
]

# --- which model ----------------------------------------------------------------------------------
BackboneName = Annotated[
    str,
    typer.Option(
        "--backbone",
        "-b",
        metavar="NAME",
        help="embedded (shipped, offline), an alias such as dinov2-s, or any timm model; "
        "see `fmupsample models`.",
        autocompletion=_complete_backbone,
        rich_help_panel=MODEL,
    ),
]
Layer = Annotated[
    str | None,
    typer.Option(
        "--layer",
        metavar="N|sN",
        help="Block or level the features come from: an index from 0, or from the end when "
        "negative (-1 is the last); sN picks the last level of stride N, e.g. s16. "
        "Default: the last block of a ViT, stride 16 of a convolutional net.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
# As in fmupsample.backbones.views, which imports torch.
VIEWS = (1, 2, 4, 9)


def check_views(value: int | None) -> int | None:
    """Refuse numbers of views that cannot be."""
    if value is not None and value not in VIEWS:
        raise typer.BadParameter(f"{value} is not one of {', '.join(map(str, VIEWS))}")
    return value


Views = Annotated[
    int,
    typer.Option(
        "--views",
        metavar="1|2|4|9",
        callback=check_views,
        help="Show every picture to the model in N views, shifted by parts of a patch: a grid two "
        "(9: three) times as fine for N times the model's time.",
        rich_help_panel=MODEL,
    ),
]
BackboneWeights = Annotated[
    Path | None,
    typer.Option(
        "--backbone-weights",
        metavar="FILE",
        help="Local checkpoint for --backbone (.safetensors, .pth, .pt, .bin).",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
UpsamplerName = Annotated[
    str | None,
    typer.Option(
        "--upsampler",
        metavar="NAME",
        help="Method: nearest, bilinear, bicubic, jbu or guided (edge-aware, need no training), or "
        "one with a trained head: affinity, bilateral-cells, resfu, sapa, ... (`fmupsample models "
        "--upsamplers`). Default: a head of this very backbone, else affinity.",
        autocompletion=complete_upsampler,
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
Head = Annotated[
    Path | None,
    typer.Option(
        "--head",
        metavar="FILE|hf:OWNER/NAME",
        help="Trained head to use instead of the shipped one: a file (.safetensors, or the "
        "authors' checkpoint of AnyUp, JAFAR, NAF or UPLiFT), or a repository of the Hugging Face "
        "hub. Without --layer, the backbone's is the head's.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
FitHead = Annotated[
    bool,
    typer.Option(
        "--fit-head",
        help="If there is no head for this backbone, first train one on these pictures (minutes), "
        "and keep it for later runs.",
        rich_help_panel=MODEL,
    ),
]

# --- how it runs ----------------------------------------------------------------------------------
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda|mps",
        help="Where to compute; auto takes a GPU if there is one. cuda:1 picks one of several.",
        rich_help_panel=COMPUTE,
    ),
]
Backend = Annotated[
    BackendName,
    typer.Option(
        "--backend",
        envvar="FMUPSAMPLE_BACKEND",
        help="What computes the upsampling on a CUDA device: the compiled extension (cuda), plain "
        "PyTorch (torch), or the first of them that works (auto).",
        rich_help_panel=COMPUTE,
    ),
]
Precision = Annotated[
    PrecisionName,
    typer.Option(
        "--precision",
        parser=number_format_of(PrecisionName),
        metavar="fp32|bf16|fp16",
        help="Arithmetic of the model; bf16 is faster where the hardware has it.",
        rich_help_panel=COMPUTE,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        min=1,
        metavar="N",
        help="Pictures of equal size that go through the model together. "
        "Default: what suits the device.",
        show_default=False,
        rich_help_panel=COMPUTE,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=0,
        metavar="N",
        help="Threads that read pictures ahead. Default: by the number of processors.",
        show_default=False,
        rich_help_panel=COMPUTE,
    ),
]

Window = Annotated[
    int | None,
    typer.Option(
        "--window",
        min=1,
        metavar="N",
        help="Show larger pictures to the model in overlapping windows of N pixels. Default: 1024 "
        "above 2048x2048 pixels.",
        show_default=False,
        rich_help_panel=COMPUTE,
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        help="Memory that upsampling may take beside models, picture and result, such as 2GB. "
        "Default: half of what is free.",
        show_default=False,
        rich_help_panel=COMPUTE,
    ),
]

# --- what comes out -------------------------------------------------------------------------------
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="FOLDER",
        help="Folder for the results; made if it does not exist.",
        show_default=False,
        rich_help_panel=RESULTS,
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Redo results that exist already.", rich_help_panel=RESULTS),
]
Prune = Annotated[
    bool,
    typer.Option(
        "--prune",
        help="Delete results of pictures that are no longer there. Without it they stay.",
        rich_help_panel=RESULTS,
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print the summary as JSON on standard output.",
        rich_help_panel=RESULTS,
    ),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="No progress bar and no notes.", rich_help_panel=RESULTS),
]
