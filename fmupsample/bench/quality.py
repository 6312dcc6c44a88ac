"""Probe quality of the methods of a bench: linear probes on labelled pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fmupsample.backbones import Backbone
from fmupsample.bench.methods import Method
from fmupsample.bench.run import BenchReport
from fmupsample.device import is_out_of_memory
from fmupsample.errors import FmupsampleError, UsageError
from fmupsample.images.size import ImageSize
from fmupsample.labels.classes import ClassTable
from fmupsample.labels.layouts import Pair
from fmupsample.pipeline import Pipeline
from fmupsample.probing.sampled import PIXELS, Comparison
from fmupsample.progress import SILENT, Progress

MOST_PICTURES = 90
_RANDOM = "random parameters: give a trained head"


def spread(pairs: Sequence[Pair], most: int = MOST_PICTURES) -> list[Pair]:
    """``most`` of them at most, evenly over their order."""
    if len(pairs) <= most:
        return list(pairs)
    return [pairs[round(i * (len(pairs) - 1) / (most - 1))] for i in range(most)]


def split(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Every third is to judge by, the others to fit on.

    Raises:
        UsageError: fewer than three.
    """
    if len(pairs) < 3:
        raise UsageError(f"probes need three labelled pictures or more, there are {len(pairs)}")
    judged = list(pairs[2::3])
    return [pair for pair in pairs if pair not in judged], judged


def measure(
    report: BenchReport,
    backbone: Backbone,
    methods: Sequence[Method],
    pairs: Sequence[Pair],
    table: ClassTable,
    size: int,
    device: torch.device,
    progress: Progress = SILENT,
    saved: Callable[[], None] = lambda: None,
) -> None:
    """Fill ``report.quality``, a row for each method. ``saved`` is called after each.

    Args:
        size: short side at which pictures are shown.

    Raises:
        UsageError, ImageError: pictures or labels that cannot be used.
    """
    train, judged = split(pairs)
    image_size = ImageSize(short=size)
    if backbone.fixed_size is not None:
        image_size = ImageSize(exact=backbone.fixed_size)
    pipeline = Pipeline(backbone, image_size=image_size, device=device)
    report.quality = {
        "image_size": str(image_size),
        "fitted_on": len(train),
        "judged_on": len(judged),
        "classes": list(table.names),
        "pixels": PIXELS,
        "rows": [],
    }
    comparison = Comparison(pipeline, train, judged, table, progress=progress)
    for method in methods:
        row = {"upsampler": method.name, "preserved": None, "fitted": None, "reason": None}
        if method.reason or method.weights == "random":
            row["reason"] = method.reason or _RANDOM
        else:
            try:
                row |= comparison.measure(method.build())
            except FmupsampleError as error:
                row["reason"] = str(error)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                row["reason"] = "out of memory"
        report.quality["rows"].append(row)
        saved()
