"""How much memory upsampling takes, against the size of the picture.

    python research/benchmarks/memory.py -o research/benchmarks/results/memory-cpu.json

Kernel weights of larger and larger square pictures, by the shipped head: all at once, and as the
pipeline makes them, in windows beyond two million pixels. Each case in a process of its own; the
number is by how much one call raises the memory in use, on top of the picture, its features and the
model. In windows it must stay flat: what grows is what is kept at low resolution, and one band of
kernel weights.

The C library is told to return what is freed (glibc keeps blocks of up to 32 MB, by which the same
call differs by 100 MB): what is counted is what is in use.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import fmupsample.pipeline.maps
from common import options, parse_options, tell_faults
from fmupsample.backbones import load_backbone
from fmupsample.bench.measuring import Apart, OutOfMemory
from fmupsample.images.find import Source
from fmupsample.images.size import Frame, ImageSize
from fmupsample.memory import parse_memory
from fmupsample.pipeline import Item, Pipeline
from fmupsample.upsamplers import load_upsampler
from reports import Report
from tables import markdown_table

SIZES = (560, 1120, 1680, 2240, 3360, 4480)
# Whole pictures are measured up to here; larger ones take gigabytes.
MOST_WHOLE = 2240
# Blocks from this size on are returned when they are freed.
_RETURNED_BYTES = 2**18
# "Flat": a pixel more takes at most this share of what it takes at once.
FLAT = 0.02


def prepare(method: str, size: int, way: str, allowed: int | None) -> Callable[[], int]:
    """A case: the kernels of one picture, row by row, and nothing kept."""
    backbone = load_backbone("embedded")
    upsampler = load_upsampler(backbone, None if method == "resfu" else method)
    pipeline = Pipeline(
        backbone, upsampler, image_size=ImageSize(exact=(size, size)), max_memory=allowed
    )
    if way == "whole":
        fmupsample.pipeline.maps._WHOLE_PIXELS = 2**62
        pipeline.max_memory = 2**62
    generator = torch.Generator().manual_seed(0)
    grid = backbone.grid((size, size))
    item = Item(
        Source(Path("drawn"), Path("drawn")),
        Frame((size, size), (size, size), (size, size)),
        np.empty((0, 0, 3), dtype=np.uint8),
        torch.randn(backbone.channels, *grid, generator=generator),
        torch.randn(3, size, size, generator=generator),
    )
    list(pipeline.kernel_rows(_corner(item, backbone)))  # libraries are loaded by now
    return lambda: _read(pipeline, item)


def _read(pipeline: Pipeline, item: Item) -> int:
    """The number of rows of kernels, each band dropped before the next one is made."""
    count = 0
    for rows in pipeline.kernel_rows(item):
        count += rows.shape[1]
        del rows
    return count


def _corner(item: Item, backbone) -> Item:
    size = (8 * backbone.stride[0], 8 * backbone.stride[1])
    frame = Frame(size, size, size)
    return Item(
        item.source,
        frame,
        item.canvas,
        item.features[:, :8, :8],
        item.image[:, : size[0], : size[1]],
    )


def measure(method: str, size: int, way: str, allowed: int | None) -> dict:
    try:
        with Apart(prepare, method, size, way, allowed) as runner:
            return {"peak_bytes": runner.peak()}
    except OutOfMemory as error:
        return {"skipped": str(error)}


def growth(results: list[dict]) -> dict[str, dict[str, float]]:
    """Per method and way: bytes that one more pixel takes, from the first picture in windows on.

    At once, from the smallest to the largest that was measured.
    """
    found: dict[str, dict[str, float]] = {}
    for method, way in sorted({(r["setting"]["method"], r["setting"]["way"]) for r in results}):
        rows = sorted(
            (r["setting"]["size"] ** 2, r["peak_bytes"])
            for r in results
            if (r["setting"]["method"], r["setting"]["way"]) == (method, way) and "peak_bytes" in r
        )
        if way == "windows":
            rows = [row for row in rows if row[0] > fmupsample.pipeline.maps._WHOLE_PIXELS]
        if len(rows) > 1:
            (first, low), (last, high) = rows[0], rows[-1]
            found.setdefault(method, {})[way] = (high - low) / (last - first)
    return found


def table(results: list[dict]) -> str:
    rows = []
    cells: dict[tuple[int, str], dict[str, str]] = {}
    for r in results:
        s = r["setting"]
        text = f"{r['peak_bytes'] / 1e6:.0f} MB" if "peak_bytes" in r else r["skipped"]
        cells.setdefault((s["size"], s["method"]), {})[s["way"]] = text
    for (size, method), ways in sorted(cells.items(), key=lambda c: (c[0][1], c[0][0])):
        rows.append([f"{size} x {size}", method, ways.get("whole", ""), ways.get("windows", "")])
    return markdown_table(["picture", "method", "at once", "as the pipeline does"], rows, words=2)


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__)
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=list(SIZES), help="sides, multiples of 14")
    add("--methods", nargs="+", default=["resfu", "bilateral-cells", "jbu"])
    add("--ways", nargs="+", default=["whole", "windows"])
    add("--max-memory", type=parse_memory, help="as of the command line")
    args = parse_options(parser, arguments)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(_RETURNED_BYTES)  # read by the processes of cases
    report = Report(args.output, torch.device("cpu"))
    for method in args.methods:
        for size in args.sizes:
            for way in args.ways:
                if way == "whole" and size > MOST_WHOLE:
                    continue
                setting = {"method": method, "size": size, "way": way}
                found = measure(method, size, way, args.max_memory)
                report.add(setting, max_memory=args.max_memory, **found)
                report.write(bytes_per_pixel=growth(report.results))
                print(size, method, way, *found.values(), flush=True)
    print("\n" + table(report.results))
    for method, ways in growth(report.results).items():
        said = ", ".join(f"{way} {value:.0f}" for way, value in ways.items())
        flat = len(ways) == 2 and ways["windows"] <= FLAT * ways["whole"]
        print(f"{method}: bytes that one more pixel takes: {said}{'; flat' if flat else ''}")


if __name__ == "__main__":
    tell_faults(main)
