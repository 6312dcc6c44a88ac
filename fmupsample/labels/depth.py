"""Depth files: 16-bit PNGs of some units a metre, or npy arrays of metres."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fmupsample.errors import ImageError, UsageError
from fmupsample.images.find import printable
from fmupsample.images.read import read_size
from fmupsample.labels.classes import COLOUR
from fmupsample.labels.layouts import Pair
from fmupsample.labels.values import UNREADABLE_ARRAY, read_values

SCALE = 1000.0  # units a metre: millimetres, as NYU's and most cameras' files
MOST_UNITS = 65535


def read_depth(path: Path, scale: float = SCALE, size: tuple[int, int] | None = None) -> np.ndarray:
    """Metres float32 ``[H, W]``; 0 where nothing is known.

    Grey PNGs and TIFFs hold whole units, ``scale`` of them a metre, and 0 for unknown. An npy file
    of floats holds metres; NaN, infinity and what is not above 0 are unknown.

    Raises:
        ImageError: unreadable, of the wrong kind, or not of ``size`` (H, W).
    """
    shown = printable(path)
    if path.suffix.lower() == ".npy":
        try:
            values = np.load(path, allow_pickle=False)
        except UNREADABLE_ARRAY as error:
            raise ImageError(f"the depths {shown} cannot be read: {error}") from error
        if values.ndim != 2 or values.dtype.kind not in "fui":
            raise ImageError(
                f"the depths {shown} are {values.dtype} {list(values.shape)}: expected [H, W]"
            )
        metres = values.astype(np.float32)
        if values.dtype.kind != "f":
            metres /= scale
        if size is not None and metres.shape != tuple(size):
            raise ImageError(
                f"the depths {shown} have {metres.shape[1]}x{metres.shape[0]} pixels, their "
                f"picture has {size[1]}x{size[0]}"
            )
    else:
        values = read_values(path, size)
        if values.max() >= COLOUR:
            raise ImageError(f"the depths {shown} are coloured; save them as 16-bit grey, or npy")
        metres = (values / scale).astype(np.float32)
    return np.where(np.isfinite(metres) & (metres > 0), metres, 0).astype(np.float32)


@dataclass
class DepthSurvey:
    """What depth files hold, in metres.

    Attributes:
        known: share of the pixels with a depth.
        sizes: how many pictures have each size (H, W).
    """

    low: float
    median: float
    high: float
    known: float
    sizes: dict[tuple[int, int], int]


def survey_depth(pairs: Sequence[Pair], scale: float = SCALE, workers: int = 2) -> DepthSurvey:
    """Read every file once and check it.

    Raises:
        ImageError: a file that cannot be used.
        UsageError: nothing known in any of them.
    """

    def look(pair: Pair) -> tuple[tuple[int, int], int, np.ndarray]:
        size = read_size(pair.source.path)
        metres = read_depth(pair.labels, scale, size)
        found = metres[metres > 0]
        marks = np.quantile(found, (0, 0.5, 1)) if found.size else np.zeros(0)
        return size, found.size, marks

    pool = ThreadPoolExecutor(max(1, workers))
    try:
        looked = list(pool.map(look, pairs))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    sizes: dict[tuple[int, int], int] = {}
    for size, _, _ in looked:
        sizes[size] = sizes.get(size, 0) + 1
    marks = [marks for _, _, marks in looked if marks.size]
    if not marks:
        raise UsageError("the depth files hold no distance: all pixels are 0 or not finite")
    all_marks = np.stack(marks)
    total = sum(size[0] * size[1] for size, _, _ in looked)
    return DepthSurvey(
        float(all_marks[:, 0].min()),
        float(np.median(all_marks[:, 1])),
        float(all_marks[:, 2].max()),
        sum(count for _, count, _ in looked) / total,
        sizes,
    )
