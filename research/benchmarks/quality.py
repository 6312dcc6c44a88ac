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
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console

import tables
from cells import Cells
from common import options, parse_options, tell_faults, write_text
from contenders import Contender, gather, named_file
from fmupsample.backbones import load_backbone
from fmupsample.device import resolve_device
from fmupsample.errors import UsageError
from fmupsample.images.size import ImageSize
from fmupsample.labels.classes import ClassTable
from fmupsample.labels.dataset import read_pair
from fmupsample.labels.layouts import Pair
from fmupsample.pipeline import Pipeline
from fmupsample.probing import (
    BoundaryF,
    Confusion,
    DiskStore,
    Example,
    FitOptions,
    LinearProbe,
    MemoryStore,
    Segmentation,
    encode,
    fit_probe,
    predict,
)
from fmupsample.probing.cache import Store, kernels_prefix
from fmupsample.progress import Progress
from fmupsample.upsamplers import Nearest, Upsampler, load_upsampler
from fmupsample_cli.progress import RichProgress, note
from labelled import CAMVID, DAVIS, camvid, davis

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


class Bench:
    """What all cells share: the backbone, the cached encodings, and how probes are fitted."""

    def __init__(self, args: argparse.Namespace, progress: Progress) -> None:
        self.args, self.progress = args, progress
        self.device = resolve_device(args.device)
        self.backbone = load_backbone(
            args.backbone, layer=args.layer, weights=args.backbone_weights
        )
        self.store: Store = (
            DiskStore(args.cache) if args.cache else MemoryStore(int(args.memory * 1e9))
        )
        pixels = args.pixels or None
        self.options = FitOptions(tuple(args.rates), epochs=args.epochs, pixels=pixels)
        # One frame says little of the directions in which its features hardly vary: whitening would
        # make them as important as the others.
        self.shot_options = FitOptions(
            (args.shot_rate,), steps=args.shot_steps, pixels=pixels, whiten=0.0
        )
        self.nearest = load_upsampler(self.backbone, Nearest.name)

    def settings(self) -> dict:
        """Everything that decides the numbers and is the same for all cells."""
        args, backbone = self.args, self.backbone

        def seedless(options: FitOptions) -> dict:
            return {k: v for k, v in options.to_dict().items() if k != "seed"}

        return {
            "backbone": backbone.name,
            "backbone_fingerprint": backbone.fingerprint,
            "layer": backbone.layer,
            "image_size": args.image_size,
            "camvid_limits": args.limits,
            "davis_sequences": args.sequences,
            "camvid_probe": seedless(self.options),
            "davis_probe": seedless(self.shot_options),
            "band": args.band,
            "tolerance": args.tolerance,
        }

    def pipeline(self, upsampler: Upsampler) -> Pipeline:
        size = ImageSize(short=self.args.image_size)
        return Pipeline(self.backbone, upsampler, image_size=size, device=self.device)

    def examples(
        self, upsampler: Upsampler, pairs: list[Pair], table: ClassTable, *, flips: bool
    ) -> list[Example]:
        """Pictures with their labels, encoded for ``upsampler``."""
        encoded = encode(
            self.pipeline(upsampler),
            [pair.source for pair in pairs],
            self.store,
            flips=flips,
            progress=self.progress,
        )
        labels = (torch.from_numpy(read_pair(pair, table)) for pair in pairs)
        return [Example(*both) for both in zip(encoded, labels, strict=True)]

    def forget(self, upsampler: Upsampler) -> None:
        """Give the room of its kernel weights back: they are by far the largest part."""
        self.store.forget(kernels_prefix(self.pipeline(upsampler)))


class CamVid:
    """One probe for all pictures: fitted on train, judged on val."""

    name = "camvid"

    def __init__(self, bench: Bench) -> None:
        self.bench, args = bench, bench.args
        self.train, self.val = (
            camvid(args.camvid, split, limit)
            for split, limit in zip(("train", "val"), args.limits, strict=True)
        )
        self.preserved: dict[int, LinearProbe] = {}

    def measure(self, contender: Contender, seeds: list[int]) -> Iterator[dict]:
        """A cell for each seed."""
        bench, upsampler = self.bench, contender.upsampler
        train = bench.examples(upsampler, self.train, CAMVID, flips=True)
        val = bench.examples(upsampler, self.val, CAMVID, flips=False)
        for seed in seeds:
            begun = time.perf_counter()
            options = replace(bench.options, seed=seed)
            preserved = self._preserved(seed, options)
            fit = fit_probe(train, upsampler, len(CAMVID), options, bench.progress)
            seconds = {"fit": round(time.perf_counter() - begun, 2)}
            probes = [preserved, fit.probe]
            metrics = [
                Segmentation(len(CAMVID), band=bench.args.band, tolerance=bench.args.tolerance)
                for _ in probes
            ]
            bench.progress.start(len(val), f"judging {contender.name}")
            for example in val:
                size = tuple(example.labels.shape)
                found = predict(probes, upsampler, example.picture.view(), size)
                for metric, classes in zip(metrics, found, strict=True):
                    metric.add(classes, example.labels)
                bench.progress.advance()
            seconds["judge"] = round(time.perf_counter() - begun - seconds["fit"], 2)
            yield {
                "seed": seed,
                "preserved": metrics[0].summary(),
                "fitted": metrics[1].summary(),
                "rate": fit.rate,
                "held_out": {f"{rate:g}": round(miou, 6) for rate, miou in fit.held_out.items()},
                "seconds": seconds,
            }

    def _preserved(self, seed: int, options: FitOptions) -> LinearProbe:
        """The probe on patch features: every pixel teaches the cell it lies in."""
        if seed not in self.preserved:
            bench = self.bench
            train = bench.examples(bench.nearest, self.train, CAMVID, flips=True)
            fit = fit_probe(train, bench.nearest, len(CAMVID), options, bench.progress)
            self.preserved[seed] = fit.probe
        return self.preserved[seed]


class Davis:
    """A probe for each sequence: fitted on its first frame, judged on the others."""

    name = "davis"

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.sequences = davis(bench.args.davis, bench.args.sequences)
        self.preserved: dict[tuple[str, int], LinearProbe] = {}

    def measure(self, contender: Contender, seeds: list[int]) -> Iterator[dict]:
        """A cell for each seed: J and F are means over frames, then over sequences."""
        bench, upsampler = self.bench, contender.upsampler
        encoded = {
            name: bench.examples(upsampler, frames[:1], DAVIS, flips=True)
            + bench.examples(upsampler, frames[1:], DAVIS, flips=False)
            for name, frames in self.sequences.items()
        }
        for seed in seeds:
            begun = time.perf_counter()
            found = {
                name: self._sequence(name, upsampler, examples, seed)
                for name, examples in encoded.items()
            }
            cell = {"seed": seed, "seconds": {"all": round(time.perf_counter() - begun, 2)}}
            for number, probe in enumerate(tables.PROBES):
                scores = {name: both[number] for name, both in found.items()}
                cell[probe] = {
                    "j": round(mean(j for j, _ in scores.values()), 6),
                    "boundary_f": round(mean(f for _, f in scores.values()), 6),
                    "sequences": {
                        name: {"j": round(j, 6), "boundary_f": round(f, 6)}
                        for name, (j, f) in scores.items()
                    },
                }
            yield cell

    def _sequence(
        self, name: str, upsampler: Upsampler, examples: list[Example], seed: int
    ) -> list[tuple[float, float]]:
        """J and F of the object for the preserved and for the fitted probe."""
        bench = self.bench
        options = replace(bench.shot_options, seed=seed)
        if (name, seed) not in self.preserved:
            first = bench.examples(bench.nearest, self.sequences[name][:1], DAVIS, flips=True)
            self.preserved[name, seed] = fit_probe(first, bench.nearest, 2, options).probe
        fit = fit_probe(examples[:1], upsampler, 2, options)
        probes = [self.preserved[name, seed], fit.probe]
        scores: list[list[tuple[float, float]]] = [[] for _ in probes]
        boundary = BoundaryF(2, tolerance=bench.args.tolerance)
        for example in examples[1:]:
            size = tuple(example.labels.shape)
            found = predict(probes, upsampler, example.picture.view(), size)
            for own, classes in zip(scores, found, strict=True):
                confusion = Confusion(2)
                confusion.add(classes, example.labels)
                j, f = confusion.iou()[1].item(), boundary.of(classes, example.labels)[1].item()
                # As in DAVIS: where there is no object and none was found, all is right.
                own.append((1.0 if math.isnan(j) else j, 1.0 if math.isnan(f) else f))
        return [(mean(j for j, _ in own), mean(f for _, f in own)) for own in scores]


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
