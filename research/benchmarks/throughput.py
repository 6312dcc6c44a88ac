"""What the pipeline adds to the time of backbone and upsampler, and what the computing waits for.

    python research/benchmarks/throughput.py -o throughput-cpu.json
    python research/benchmarks/throughput.py photos/ --pictures 200 --device cuda -o gpu.json

Whole runs of ``extract`` (tokens, compact files) and ``visualize`` (PCA), as the commands do them,
from picture files to result files, in turns with the models alone: backbone, kernel weights and
what the result needs of reassembly, on the same pictures, decoded, normalised and on the device
already. The pictures are dealt into rounds; in each, kinds come in a new random order, runs and
models twice (models, run, run, models, or the other way round), and the overhead is the ratio of
the two. Waiting is the time for which the thread that computes stands still for the next decoded
picture, or for the writer.
"""

from __future__ import annotations

import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

import bars
from common import options, parse_options, tell_faults
from fmupsample.backbones import load_backbone
from fmupsample.bench.measuring import summary
from fmupsample.device import autocast, resolve_device
from fmupsample.heap import keep_freed_memory
from fmupsample.images import ImageSize, Source, find_images
from fmupsample.jobs.extract import ExtractOptions, extract
from fmupsample.jobs.visualize import VisualizeOptions, visualize
from fmupsample.pipeline import Item, Pipeline
from fmupsample.upsamplers import load_upsampler
from reports import Report
from waits import Waits

LIMIT = 10.0  # percent that the pipeline may add on a CPU
DRAWN = (960, 1280)  # pixels of a drawn picture


@dataclass(frozen=True)
class Kind:
    """One kind of result: the run that makes it, and what the models do for one picture."""

    run: Callable[[Pipeline, list[Source], Path], object]
    models: Callable[[Pipeline, Item], object]


def _extract(**options: object) -> Callable[[Pipeline, list[Source], Path], object]:
    def run(pipeline: Pipeline, sources: list[Source], out: Path) -> object:
        report = extract(pipeline, sources, out, ExtractOptions(**options))
        assert len(report.done) == len(sources), report.failed
        return report

    return run


def _visualize(pipeline: Pipeline, sources: list[Source], out: Path) -> object:
    report = visualize(pipeline, sources, out, VisualizeOptions())
    assert len(report.drawn) == len(sources), report.failed
    return report


def _kernels(pipeline: Pipeline, item: Item) -> None:
    for _ in pipeline.kernel_rows(item):
        pass


KINDS = {
    "tokens": Kind(_extract(tokens_only=True), lambda pipeline, item: None),
    "compact": Kind(_extract(format="compact"), _kernels),
    "pca": Kind(
        _visualize, lambda pipeline, item: pipeline.upsample(item, None, item.features[:3])
    ),
    "maps": Kind(_extract(), lambda pipeline, item: pipeline.upsample(item)),
}
DEFAULT = ("tokens", "compact", "pca")


# -- the models alone ------------------------------------------------------------------------------


@dataclass
class Decoded:
    """Pictures that share a batch, ready for the backbone."""

    items: list[Item]  # whose features are not there yet
    images: torch.Tensor  # [B, 3, H, W]


def decode(pipeline: Pipeline, sources: list[Source]) -> list[Decoded]:
    """All of them, in the batches of the pipeline."""
    buckets: dict[tuple[int, int], list[Item]] = {}
    for source in sources:
        frame, canvas = pipeline.load(source)
        item = Item(source, frame, canvas, torch.empty(0), pipeline.guidance(canvas))
        buckets.setdefault(frame.canvas, []).append(item)
    size = pipeline.batch_size
    batches = [b[i : i + size] for b in buckets.values() for i in range(0, len(b), size)]
    return [Decoded(batch, torch.stack([item.image for item in batch])) for batch in batches]


@torch.no_grad()
def models_alone(pipeline: Pipeline, kind: Kind, batches: list[Decoded]) -> None:
    for batch in batches:
        with autocast(pipeline.device, pipeline.dtype):
            features = pipeline.backbone(batch.images)
        for item, own in zip(batch.items, features.float(), strict=True):
            item.features = own
            kind.models(pipeline, item)
            item.features = torch.empty(0)
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)


# -- measuring -------------------------------------------------------------------------------------


def measure(
    pipeline: Pipeline, sources: list[Source], kinds: list[str], rounds: int, work: Path
) -> dict[str, dict]:
    """Every kind, in rounds of different pictures; seconds are of one picture."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    warm = decode(pipeline, sources[:2])
    for kind in kinds:
        models_alone(pipeline, KINDS[kind], warm)
        _whole_run(pipeline, KINDS[kind], sources[:2], work)
    rng = random.Random(0)
    for number in range(rounds):
        share = sources[number::rounds]
        batches = decode(pipeline, share)
        order = list(kinds)
        rng.shuffle(order)
        for name in order:
            first, second = rng.sample(("models", "whole"), 2)
            row: dict[str, float] = {}
            for part in (first, second, second, first):  # a machine that slows down slows both
                if part == "models":
                    began = time.perf_counter()
                    models_alone(pipeline, KINDS[name], batches)
                    taken = {"models": time.perf_counter() - began}
                else:
                    taken = _whole_run(pipeline, KINDS[name], share, work)
                for key, seconds in taken.items():
                    row[key] = row.get(key, 0.0) + seconds / (2 * len(share))
            found[name].append(row)
            print(f"round {number + 1} of {rounds}, {name}: {_percent(row):+.1f} %", flush=True)
    return {name: _summarise(rows) for name, rows in found.items()}


def _whole_run(
    pipeline: Pipeline, kind: Kind, sources: list[Source], work: Path
) -> dict[str, float]:
    """Seconds by the clock, of all processors, and of waiting."""
    with tempfile.TemporaryDirectory(dir=work) as folder, Waits() as waits:
        began, processors = time.perf_counter(), time.process_time()
        kind.run(pipeline, sources, Path(folder) / "out")
        return {
            "pipeline": time.perf_counter() - began,
            "processors": time.process_time() - processors,
            **waits.seconds,
        }


def _percent(row: dict[str, float]) -> float:
    return 100 * (row["pipeline"] / row["models"] - 1)


def _summarise(rows: list[dict[str, float]]) -> dict:
    overheads = [_percent(row) for row in rows]
    waiting = {
        what: [100 * row[what] / row["pipeline"] for row in rows] for what in ("decode", "write")
    }
    return {
        "models": summary([row["models"] for row in rows]),
        "pipeline": summary([row["pipeline"] for row in rows]),
        "processors": summary([row["processors"] for row in rows]),
        "overhead_percent": {
            "median": statistics.median(overheads),
            "least": min(overheads),
            "most": max(overheads),
        },
        "waiting_percent": {
            what: {"median": statistics.median(values), "most": max(values)}
            for what, values in waiting.items()
        },
    }


# -- pictures, bars, report ------------------------------------------------------------------------


def draw(folder: Path, count: int, size: tuple[int, int] = DRAWN) -> list[Source]:
    """JPEG files as a camera's: discs and boxes on a gradient, soft edges, grain."""
    folder.mkdir(parents=True)
    height, width = size
    for number in range(count):
        rng = np.random.default_rng(number)
        portrait = number % 4 == 3
        h, w = (width, height) if portrait else (height, width)
        rows, columns = np.mgrid[:h, :w].astype(np.float32)
        mixed = [rows / h, columns / w, (rows + columns) / (h + w)]
        pixels = 255 * np.stack([mixed[i] for i in rng.permutation(3)], -1)
        picture = Image.fromarray(pixels.astype(np.uint8))
        pen = ImageDraw.Draw(picture)
        for shape in range(24):
            x, y = rng.integers(0, w), rng.integers(0, h)
            r = int(rng.integers(20, h // 4))
            box, colour = (x - r, y - r, x + r, y + r), tuple(map(int, rng.integers(0, 256, 3)))
            (pen.ellipse if shape % 2 else pen.rectangle)(box, fill=colour)
        pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(1.5)), dtype=np.float32)
        pixels = pixels + rng.normal(0, 6, pixels.shape).astype(np.float32)
        grain = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        grain.save(folder / f"{number:04}.jpg", quality=92)
    return find_images([folder])


class OverheadBar(bars.Bar):
    """Of every result, whatever its setting."""

    def applies_to(self, result: dict) -> bool:
        return result["device"] == self.device


def _overhead(kind: str) -> Callable[[dict], float]:
    return lambda result: result["kinds"][kind]["overhead_percent"]["median"]


BARS = [
    OverheadBar(f"{kind}: added by the pipeline", "cpu", LIMIT, "%", _overhead(kind))
    for kind in DEFAULT
]


def table(result: dict) -> str:
    """One line a kind, times of one picture."""
    lines = [
        f"{'':10s}{'models':>12s}{'pipeline':>12s}{'added':>10s}{'least to most':>18s}"
        f"{'waits: decode':>16s}{'write':>8s}"
    ]
    for name, row in result["kinds"].items():
        added, waits = row["overhead_percent"], row["waiting_percent"]
        spread = f"{added['least']:.1f} to {added['most']:.1f} %"
        lines.append(
            f"{name:10s}{1e3 * row['models']['median_s']:9.1f} ms"
            f"{1e3 * row['pipeline']['median_s']:9.1f} ms{added['median']:8.1f} %{spread:>18s}"
            f"{waits['decode']['median']:14.1f} %{waits['write']['median']:6.1f} %"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__)
    add = parser.add_argument
    add("images", nargs="*", help="pictures or folders; default: drawn ones of 960 x 1280 pixels")
    add("--pictures", type=int, default=200)
    add("--rounds", type=int, default=4, help="into which the pictures are dealt (4)")
    add("--kinds", nargs="+", choices=KINDS, default=list(DEFAULT))
    add("--backbone", default="embedded")
    add("--random", action="store_true", help="random weights: takes as long, nothing downloaded")
    add("--upsampler", help="default: the backbone's head")
    add("--image-size", type=ImageSize.parse, help="as of the command line")
    add("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    add("--batch-size", type=int)
    add("--workers", type=int)
    add("--device", default="auto")
    add("--folder", type=Path, help="where results go; default: the folder for temporary files")
    args = parse_options(parser, arguments)
    keep_freed_memory()  # as the command does
    device = resolve_device(args.device)
    report = Report(args.output, device)
    backbone = load_backbone(args.backbone, pretrained=not args.random)
    pipeline = Pipeline(
        backbone,
        load_upsampler(backbone, args.upsampler),
        image_size=args.image_size,
        device=device,
        precision=args.precision,
        batch_size=args.batch_size,
        workers=args.workers,
    )
    work = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        if args.images:
            sources = find_images(args.images)[: args.pictures]
        else:
            sources = draw(work / "in", args.pictures)
        rounds = max(1, min(args.rounds, len(sources) // 2))
        kinds = measure(pipeline, sources, args.kinds, rounds, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    result = report.add(
        {
            "backbone": backbone.name,
            "upsampler": pipeline.upsampler.name,
            "image_size": str(args.image_size or backbone.default_image_size),
            "precision": args.precision,
            "batch_size": pipeline.batch_size,
            "workers": pipeline.workers,
            "drawn": not args.images,
            "pictures": len(sources),
            "rounds": rounds,
        },
        kinds=kinds,
    )
    print("\n" + table(result))
    rows = bars.evaluate([result], BARS)
    print("\n" + bars.table(rows))
    report.write(bars=rows)


if __name__ == "__main__":
    tell_faults(main)
