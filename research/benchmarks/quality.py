"""How good upsampled features are: linear probes on frozen features, every upsampler alike.

    python research/benchmarks/quality.py --quick --camvid DIR -o quick.json
    python research/benchmarks/quality.py --camvid DIR --davis DIR --cache DIR -o full.json
    python research/benchmarks/quality.py --quick --camvid DIR --head mine=FILE --ablate mine

Two probes for each upsampler. *preserved*: fitted on the patch features (the same classifier for
all), applied to the upsampled ones. *fitted*: fitted on the upsampled features. A run that was
stopped goes on where it was when it is given the same -o. README.md says what each number is.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

import tables
from cells import Cells
from common import options, parse_options, tell_faults, write_text
from contenders import Contender, gather, named_file
from fmupsample.errors import UsageError
from fmupsample.upsamplers import Nearest
from fmupsample_cli.progress import RichProgress, note
from protocols import Bench, CamVid, Davis

QUICK = {"image_size": 336, "limits": (100, 50), "seeds": 1}
FULL = {"image_size": 448, "limits": (None, None), "seeds": 3}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = options(__doc__, "JSON; finished cells in it are not repeated")
    add = parser.add_argument
    add("--camvid", type=Path, help="folder with train/ and val/, each with images/ and labels/")
    add("--davis", type=Path, help="folder with images/SEQUENCE and labels/SEQUENCE")
    add("--quick", action="store_true", help="100 and 50 pictures of CamVid at 336 px, one seed")
    add("--backbone", default="embedded")
    add("--layer", help="of the backbone; default: as everywhere")
    add("--backbone-weights", type=Path)
    add(
        "--upsamplers",
        nargs="*",
        default=["nearest", "bilinear", "jbu", "resfu"],
        help="names (nearest bilinear jbu resfu)",
    )
    add("--head", action="append", default=[], metavar="NAME=FILE", help="a head file; repeatable")
    add("--ablate", nargs="*", metavar="NAME", help="heads to take parts out of (resfu)")
    add("--image-size", type=int, help="short side in pixels (448; --quick: 336)")
    add("--limits", type=int, nargs=2, help="pictures of CamVid train and val (all)")
    add("--sequences", type=int, help="of DAVIS (all)")
    add("--seeds", type=int, help="3; --quick: 1")
    add("--epochs", type=int, default=20, help="of a probe on CamVid")
    add(
        "--rates",
        type=float,
        nargs="+",
        default=[1e-2, 3e-2, 1e-1, 3e-1],
        help="learning rates to choose from by held-out training pictures (CamVid)",
    )
    add("--shot-steps", type=int, default=300, help="of a probe on one frame of DAVIS")
    add("--shot-rate", type=float, default=0.1, help="its learning rate")
    add("--pixels", type=int, default=4096, help="drawn per picture and step; 0: all")
    add("--band", type=int, default=5, help="pixels around label edges")
    add("--tolerance", type=float, default=0.0075, help="of boundary F, share of the diagonal")
    add("--cache", type=Path, help="folder for features and kernel weights; else in memory")
    add("--memory", type=float, default=6, help="GB for them without --cache")
    add("--device", default="auto", help="of the backbone and the upsamplers; probes use the CPU")
    add("--markdown", type=Path, help="the tables as markdown")
    args = parse_options(parser, arguments)
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.limits = [n or None for n in args.limits]
    args.ablate = ["resfu"] if args.ablate == [] else args.ablate or []
    if args.camvid is None and args.davis is None:
        parser.error("give --camvid, --davis, or both")
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    return args


def run(bench: Bench, cells: Cells, contenders: list[Contender], say: Callable[[str], None]):
    """Measure every cell that is not finished."""
    args = bench.args
    sets = [kind for kind in (CamVid, Davis) if getattr(args, kind.name) is not None]
    for data in [kind(bench) for kind in sets]:
        for contender in contenders:
            known = (data.name, contender.name, contender.fingerprint)
            seeds = [s for s in range(args.seeds) if cells.find(*known, s) is None]
            if not seeds:
                say(f"{data.name}, {contender.name}: finished before")
                continue
            begun = time.perf_counter()
            for cell in data.measure(contender, seeds):
                shared = dict(zip(("dataset", "upsampler", "fingerprint"), known, strict=True))
                cells.add(shared | cell, contender.describe())
                said = ", ".join(
                    f"{probe} {100 * cell[probe][key]:.1f}"
                    for probe in tables.PROBES
                    for key in list(tables.COLUMNS[data.name])[:1]
                )
                seconds = time.perf_counter() - begun
                say(f"{data.name}, {contender.name}, seed {cell['seed']}: {said} ({seconds:.0f} s)")
            if contender.upsampler.name != Nearest.name:
                bench.forget(contender.upsampler)
        bench.forget(bench.nearest)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    with RichProgress(unit="steps") as progress:
        bench = Bench(args, progress)
        heads = [named_file(text) for text in args.head]
        contenders, skipped = gather(bench.backbone, args.upsamplers, heads, args.ablate)
        if not contenders:
            raise UsageError("nothing to compare: name --upsamplers, or give a --head")
        cells = Cells(args.output, bench.device, bench.settings())
        cells.skipped |= skipped
        for name, reason in skipped.items():
            note(f"{name}: left out, {reason}")
        run(bench, cells, contenders, note)
    cells.write()
    names = [contender.name for contender in contenders]
    console = Console()
    for dataset in tables.COLUMNS:
        if tables.rows(cells.cells, dataset, names):
            console.print(tables.table(cells.cells, dataset, names))
    write_text(args.markdown, tables.markdown(cells.cells, names))


if __name__ == "__main__":
    tell_faults(main)
