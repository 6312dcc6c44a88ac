"""Options of ``fmupsample probe fit`` alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fmupsample_cli import options as o
from fmupsample_cli import probe_options as p

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
