"""What fitting and using a linear probe costs, against making the upsampled features.

    python research/benchmarks/probing.py -o probing.json
    python research/benchmarks/probing.py --camvid DIR --cache DIR -o camvid.json

An epoch of a few pictures whose features and kernel weights are cached, and one picture from its
pixels to its mask. Everything is timed interleaved, each case in a process of its own; README.md
says what each case is. With --camvid: the probes of some upsamplers on CamVid.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path, PurePosixPath
from statistics import mean

import torch
import torch.nn.functional as F

import bars
from bars import Bar
from cases import CLASSES, Setting, Workload
from common import options, parse_options, tell_faults, write_json
from fmupsample.backbones import load_backbone
from fmupsample.bench.machine import describe
from fmupsample.bench.measuring import Apart, Case, OutOfMemory, time_cases
from fmupsample.images.find import Source
from fmupsample.images.size import ImageSize
from fmupsample.labels import open_dataset, parse_classes, survey
from fmupsample.pipeline import Pipeline
from fmupsample.probing import (
    EncodedPicture,
    Example,
    FitOptions,
    LinearProbe,
    Store,
)
from fmupsample.probing.batches import Batches, Classifiers
from fmupsample.probing.evaluate import evaluate, report
from fmupsample.probing.fit import fit_classes, options_for
from fmupsample.probing.tasks import Classes, largest
from fmupsample.upsamplers import load_upsampler
from fmupsample_cli.progress import RichProgress
from labelled import CAMVID
from reports import Report

PICTURES = 4  # of an epoch, and of a batch
EPOCHS = ("epoch, drawn pixels", "epoch, all pixels", "epoch, materialised")
PREDICTIONS = ("backbone", "predict", "predict, materialised")
RATE = 0.1


def _ratio(
    case: str, base: str, limit: float, *, what: str = "median_s", at_least: bool = True
) -> Bar:
    def value(result: dict) -> float:
        return result["cases"][case][what] / result["cases"][base][what]

    kind = "" if what == "median_s" else " (memory)"
    return Bar(f"{case} / {base}{kind}", "cpu", limit, "x", value, at_least)


BARS = [
    *(
        _ratio("epoch, materialised", ours, 10, what=what)
        for ours in EPOCHS[:2]
        for what in ("median_s", "peak_bytes")
    ),
    _ratio("predict", "backbone", 1.5, at_least=False),
]


def prepare(setting: Setting, name: str) -> Case:
    """The case ``name`` on the CPU, for :class:`measuring.Apart`."""
    return _epoch(setting, name) if name in EPOCHS else _prediction(setting, name)


def _examples(setting: Setting) -> tuple[Workload, list[Example]]:
    """Pictures with random features, kernel weights and labels, as the cache gives them."""
    store, generator = Store(), torch.Generator().manual_seed(0)
    work = Workload(setting, torch.device("cpu"))
    side, cells = setting.size, setting.cells
    examples = []
    for number in range(PICTURES):
        keys = (f"features-{number}", f"kernels-{number}")
        features = torch.randn(setting.channels, cells, cells, generator=generator)
        scores = torch.randn(9, side, side, generator=generator)
        store.put(keys[0], features.half())
        store.put(keys[1], scores.softmax(0).half())
        source = Source(Path(f"{number}.png"), PurePosixPath(f"{number}.png"))
        labels = torch.randint(CLASSES, (side, side), generator=generator, dtype=torch.uint8)
        examples.append(Example(EncodedPicture(source, (keys,), store), labels))
    return work, examples


def _epoch(setting: Setting, name: str) -> Case:
    """One pass over the pictures: forward, backward and a step of the optimiser."""
    work, examples = _examples(setting)
    if name == "epoch, materialised":
        return _materialised_epoch(work, examples)
    pixels = 4096 if name == "epoch, drawn pixels" else None
    options = FitOptions((RATE,), pixels=pixels, flips=False, batch_size=PICTURES)
    generator = torch.Generator().manual_seed(0)
    classifiers = Classifiers(examples, CLASSES, options, generator)
    data = Batches(examples, work.head, Classes(CLASSES), options, generator)
    optimizer = torch.optim.AdamW([p for both in classifiers.parameters for p in both], lr=RATE)

    def run() -> float:
        optimizer.zero_grad()
        loss = data.backward(classifiers, data.draw(PICTURES))
        optimizer.step()
        return loss.item()

    return run


def _materialised_epoch(work: Workload, examples: list[Example]) -> Case:
    """The same with a map of all channels at every pixel, and a 1x1 convolution on it.

    The map is made by our own, fast reassembly, one picture at a time, its gradient added up.
    """
    classifier = torch.nn.Conv2d(work.setting.channels, CLASSES, 1)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=RATE)

    def run() -> float:
        optimizer.zero_grad()
        total = 0.0
        for example in examples:
            view = example.picture.view()
            with torch.no_grad():
                dense = work.head.reassemble(
                    view.weights.float()[None], view.features.float()[None]
                )
            loss = F.cross_entropy(classifier(dense), example.labels.long()[None]) / PICTURES
            loss.backward()
            total += loss.item()
        optimizer.step()
        return total

    return run


def _prediction(setting: Setting, name: str) -> Case:
    """One picture, from its pixels to its mask (the backbone's own pass is part of it)."""
    work = Workload(setting, torch.device("cpu"))
    backbone, image, head = work.backbone, work.image, work.head
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(CLASSES, setting.channels, generator=generator)
    probe = LinearProbe(weight, torch.zeros(CLASSES))
    cells = setting.cells

    def features() -> torch.Tensor:
        tokens = backbone.forward_features(image)[:, -(cells**2) :]
        return tokens.transpose(1, 2).reshape(1, -1, cells, cells)

    def predict() -> torch.Tensor:
        x = features()
        weights = head.kernels(x, image)
        return largest(head.reassemble(weights, probe.logits(x[0])[None])[0])

    def materialised() -> torch.Tensor:
        dense = head(features(), image)
        return largest(F.conv2d(dense, weight[:, :, None, None], probe.bias)[0])

    return torch.no_grad()(
        {"backbone": features, "predict": predict, "predict, materialised": materialised}[name]
    )


def measure(setting: Setting, rounds: int, seconds: float, memory: bool) -> dict:
    """Times and peaks of every case in one setting."""
    skipped: dict[str, str] = {}
    with ExitStack() as stack:
        found = {}
        for name in (*EPOCHS, *PREDICTIONS):
            try:
                found[name] = stack.enter_context(Apart(prepare, setting, name))
            except OutOfMemory as error:
                skipped[name] = str(error)
        cases, failed = time_cases(
            found, rounds, seconds=seconds, peaks=lambda name: memory and name != "backbone"
        )
    return {
        "pictures": PICTURES,
        "classes": CLASSES,
        "cases": cases,
        "skipped": skipped | failed,
    }


def measure_camvid(args: argparse.Namespace) -> dict:
    """``probe fit`` and ``probe eval`` on CamVid with the shipped backbone.

    Seconds of ``fit`` are those with everything cached; ``encode`` is what was not.
    """
    backbone = load_backbone("embedded")
    sets = {split: open_dataset(args.camvid / split) for split in ("train", "val")}
    if args.limit:
        for data in sets.values():
            data.pairs = data.pairs[: args.limit]
    names = parse_classes(",".join(CAMVID.names))
    tables = {split: survey(data, given=names).table for split, data in sets.items()}
    store = Store(0, args.cache)
    rows = []
    with RichProgress(unit="steps") as progress:
        for name, seed in product(args.upsamplers, range(args.seeds)):
            size = ImageSize(short=args.camvid_size)
            pipeline = Pipeline(backbone, load_upsampler(backbone, name), image_size=size)
            options = options_for(len(sets["train"].pairs), epochs=args.epochs, seed=seed)
            fitted = fit_classes(
                pipeline, sets["train"], tables["train"], options, store=store, progress=progress
            )
            begun = time.perf_counter()
            judge = evaluate(fitted.probe, pipeline, sets["val"], tables["val"], progress=progress)
            seconds = fitted.seconds | {"eval": round(time.perf_counter() - begun, 2)}
            found = report(judge, tables["val"])
            del found["confusion"]
            row = {"upsampler": name, "seed": seed, "rate": fitted.fit.rate, "seconds": seconds}
            rows.append(row | found)
    return {
        "pictures": {split: len(data.pairs) for split, data in sets.items()},
        "image_size": args.camvid_size,
        "options": {k: v for k, v in options.to_dict().items() if k != "seed"},
        "rows": rows,
    }


def show_camvid(found: dict) -> None:
    """Means over the seeds, per upsampler, and IoU of each class."""
    count = found["pictures"]
    print(f"\nCamVid, {count['train']} pictures to fit, {count['val']} to judge, in percent")
    names = list(dict.fromkeys(row["upsampler"] for row in found["rows"]))
    print(f"{'':18s}" + "".join(f"{name:>12s}" for name in names))

    def line(title: str, value: Callable[[dict], float]) -> None:
        means = (mean(value(r) for r in found["rows"] if r["upsampler"] == n) for n in names)
        print(f"{title:18s}" + "".join(f"{number:12.1f}" for number in means))

    for title, key in (
        ("mIoU", "miou"),
        ("mIoU at edges", "band_miou"),
        ("boundary F", "boundary_f"),
        ("pixel accuracy", "pixel_accuracy"),
    ):
        line(title, lambda row, key=key: 100 * row[key])
    for name in found["rows"][0]["iou"]:
        line(f"IoU {name}", lambda row, name=name: 100 * (row["iou"][name] or 0))
    for key in ("encode", "fit", "eval"):
        line(f"{key}, seconds", lambda row, key=key: row["seconds"][key])


def show(setting: Setting, result: dict) -> None:
    print(f"\n{setting}, {PICTURES} pictures an epoch, {CLASSES} classes")
    for name, row in result["cases"].items():
        low, high = (1e3 * q for q in row["quartiles_s"])
        peak = f"{row['peak_bytes'] / 1e6:8.0f} MB" if "peak_bytes" in row else ""
        print(f"{name:24s} {1e3 * row['median_s']:9.1f} ms ({low:.1f} to {high:.1f}) {peak}")
    for name, reason in result["skipped"].items():
        print(f"{name}: not measured, {reason}")


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__)
    add = parser.add_argument
    add("--size", type=int, default=448, help="pixels of the square picture (448)")
    add("--channels", type=int, default=384)
    add("--rounds", type=int, default=7)
    add("--seconds", type=float, default=60, help="begin no further round after this")
    add("--no-memory", action="store_true", help="without peak memory")
    add("--camvid", type=Path, help="fit and judge on CamVid instead: a folder with train/, val/")
    add("--camvid-size", type=int, default=336, help="its pictures' short side (336)")
    add("--upsamplers", nargs="+", default=["bilinear", "resfu"])
    add("--seeds", type=int, default=1)
    add("--epochs", type=int, default=20)
    add("--limit", type=int, help="pictures of each split (all)")
    add("--cache", type=Path, help="folder for its features and kernel weights")
    args = parse_options(parser, arguments)
    if args.camvid and not args.cache:
        parser.error("--camvid needs --cache")
    if args.camvid:
        machine, found = describe(torch.device("cpu")), measure_camvid(args)
        show_camvid(found)
        write_json(args.output, {"machine": machine, "camvid": found})
        return
    results = Report(args.output, torch.device("cpu"))
    setting = replace(Setting(), size=args.size, channels=args.channels)
    result = measure(setting, args.rounds, args.seconds, not args.no_memory)
    show(setting, result)
    results.add(asdict(setting), **result)
    rows = bars.evaluate(results.results, BARS)
    print("\n" + bars.table(rows))
    results.write(bars=rows)


if __name__ == "__main__":
    tell_faults(main)
