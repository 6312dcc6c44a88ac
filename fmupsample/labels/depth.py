"""Depth files: 16-bit PNGs of some units a metre, or npy arrays of metres."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fmupsample.errors import ImageError, UsageError
from fmupsample.images.find import printable
from fmupsample.labels.classes import COLOUR
from fmupsample.labels.matching import Pair
from fmupsample.labels.surveys import Sizes, look_at_all
from fmupsample.labels.values import check_size, load_array, read_values

SCALE = 1000.0  # units a metre: millimetres, as NYU's and most cameras' files
MOST_UNITS = 65535


def read_depth(path: Path, scale: float = SCALE, size: tuple[int, int] | None = None) -> np.ndarray:
    """Metres float32 ``[H, W]``; 0 where nothing is known.

    Grey PNGs and TIFFs hold whole units, ``scale`` of them a metre, and 0 for unknown. An npy file
    of floats holds metres; NaN, infinity and what is not above 0 are unknown.

    Raises:
        ImageError: unreadable, of the wrong kind, or not of ``size`` (H, W).
    """
    if path.suffix.lower() == ".npy":
        values = load_array(path, "depths")
        if values.ndim != 2 or values.dtype.kind not in "fui":
            raise ImageError(
                f"the depths {printable(path)} are {values.dtype} {list(values.shape)}: expected "
                "[H, W]"
            )
        check_size(values, path, size, "depths")
    else:
        values = read_values(path, size)
        if values.max() >= COLOUR:
            raise ImageError(
                f"the depths {printable(path)} are coloured; save them as 16-bit grey, or npy"
            )
    metres = values.astype(np.float32) / (1 if values.dtype.kind == "f" else scale)
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
    sizes: Sizes


def survey_depth(pairs: Sequence[Pair], scale: float = SCALE, workers: int = 2) -> DepthSurvey:
    """Read every file once and check it.

    Raises:
        ImageError: a file that cannot be used.
        UsageError: nothing known in any of them.
    """

    def look(pair: Pair, size: tuple[int, int]) -> tuple[int, np.ndarray]:
        metres = read_depth(pair.labels, scale, size)
        found = metres[metres > 0]
        return found.size, np.quantile(found, (0, 0.5, 1)) if found.size else np.zeros(0)

    looked, sizes = look_at_all(pairs, look, workers)
    marks = [own for _, own in looked if own.size]
    if not marks:
        raise UsageError("the depth files hold no distance: all pixels are 0 or not finite")
    low, median, high = np.stack(marks).T
    known = sum(count for count, _ in looked)
    total = sum(count * height * width for (height, width), count in sizes.items())
    return DepthSurvey(
        float(low.min()), float(np.median(median)), float(high.max()), known / total, sizes
    )
