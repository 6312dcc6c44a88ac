"""Probe quality of the methods of a bench: linear probes on labelled pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fmupsample.bench.methods import Method
from fmupsample.bench.run import Bench
from fmupsample.device import is_out_of_memory
from fmupsample.errors import FmupsampleError, UsageError
from fmupsample.images.size import ImageSize
from fmupsample.labels.classes import ClassTable
from fmupsample.labels.layouts import Pair
from fmupsample.pipeline import Pipeline
from fmupsample.probing.sampled import PIXELS, Comparison

_RANDOM = "random parameters: give a trained head"


def spread(pairs: Sequence[Pair], most: int) -> list[Pair]:
    """``most`` of them at most, evenly over their order."""
    if len(pairs) <= most:
        return list(pairs)
    return [pairs[round(i * (len(pairs) - 1) / max(1, most - 1))] for i in range(most)]


def split(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Every third is to judge by, the others to fit on.

    Raises:
        UsageError: fewer than three.
    """
    if len(pairs) < 3:
        raise UsageError(f"probes need three labelled pictures or more, there are {len(pairs)}")
    return [pair for i, pair in enumerate(pairs) if i % 3 < 2], list(pairs[2::3])


def measure(
    bench: Bench,
    pairs: Sequence[Pair],
    table: ClassTable,
    saved: Callable[[], None] = lambda: None,
) -> None:
    """Fill ``bench.report.quality``, a row for each method, at the largest size.

    ``saved`` is called after each.

    Raises:
        UsageError, ImageError: pictures or labels that cannot be used.
    """
    train, judged = split(pairs)
    backbone = bench.backbone
    image_size = ImageSize(short=max(bench.options.sizes))
    if backbone.fixed_size is not None:
        image_size = ImageSize(exact=backbone.fixed_size)
    rows: list[dict[str, Any]] = []
    bench.report.quality = {
        "image_size": str(image_size),
        "fitted_on": len(train),
        "judged_on": len(judged),
        "classes": list(table.names),
        "pixels": PIXELS,
        "rows": rows,
    }
    pipeline = Pipeline(backbone, image_size=image_size, device=bench.device)
    comparison = Comparison(pipeline, train, judged, table, progress=bench.progress)
    for method in bench.methods:
        row = {"upsampler": method.name, "preserved": None, "fitted": None, "reason": None}
        rows.append(row | _measured(comparison, method))
        saved()


def _measured(comparison: Comparison, method: Method) -> dict[str, Any]:
    if method.reason or method.weights == "random":
        return {"reason": method.reason or _RANDOM}
    try:
        return comparison.measure(method.build())
    except FmupsampleError as error:
        return {"reason": str(error)}
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {"reason": "out of memory"}
