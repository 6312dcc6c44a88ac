"""Small copies of what a run draws, so that its contact sheets need not read every file again."""

from __future__ import annotations

import numpy as np

from fmupsample.images.arrays import resize
from fmupsample.images.find import Source
from fmupsample.render.contact import FEW
from fmupsample.visualization.draw import Drawing

_SIDE = 288  # short side; rows of a sheet of many are about 190 high, and rarely half as much more
_LIMIT = 64 * 2**20  # bytes


def cut(pixels: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """What lies in ``box`` (left, top, width, height)."""
    x, y, width, height = box
    return pixels[y : y + height, x : x + width]


class Thumbnails:
    """Of photographs and their colours, kept in memory up to a bound.

    Args:
        pictures: of the run; a few are kept as large as they are.
    """

    def __init__(self, pictures: int) -> None:
        self._small = pictures > FEW
        self._left = _LIMIT
        self._kept: dict[Source, tuple[np.ndarray, np.ndarray]] = {}

    def reduce(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 ``[H, W, 3]`` as small as it is kept: the same of a drawing and of its file."""
        scale = _SIDE / min(pixels.shape[:2])
        if not self._small or scale >= 1:
            return pixels
        height, width = (max(1, round(n * scale)) for n in pixels.shape[:2])
        return resize(pixels, (height, width))

    def add(self, source: Source, drawing: Drawing) -> None:
        """Keep both, if there is room and the drawing holds both."""
        if drawing.photo is None or drawing.colours is None or not self._left:
            return
        pair = tuple(
            self.reduce(cut(drawing.pixels, box)).copy() for box in (drawing.photo, drawing.colours)
        )
        size = sum(pixels.nbytes for pixels in pair)
        self._left = max(0, self._left - size)
        if self._left:
            self._kept[source] = pair

    def get(self, source: Source) -> tuple[np.ndarray, np.ndarray] | None:
        """The photograph and its colours, where they are kept."""
        return self._kept.get(source)
