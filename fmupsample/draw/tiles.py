"""Sizes of tiles, and cells drawn at them."""

from __future__ import annotations

import numpy as np

SMALLEST, LARGEST = 448, 640  # short side of a tile, where the picture's shape allows
LONGEST = 1600  # long side of a tile


def tile_size(
    height: int, width: int, *, smallest: int = SMALLEST, largest: int = LARGEST
) -> tuple[int, int]:
    """Size ``(H, W)`` at which a picture of this shape is drawn in a panel.

    Its own size where the short side is between ``smallest`` and ``largest``, else scaled to the
    nearer of the two; the long side is at most ``LONGEST`` (a panorama gets flatter tiles).
    """
    short = min(height, width)
    scale = min(max(short, smallest), largest) / short
    scale = min(scale, LONGEST / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def blocks(
    cells: np.ndarray,
    size: tuple[int, int],
    *,
    placed: tuple[int, int] | None = None,
    canvas: tuple[int, int] | None = None,
) -> np.ndarray:
    """Low-resolution cells ``[h, w, ...]`` as flat blocks ``[H, W, ...]``.

    Args:
        size: ``(H, W)`` of the result.
        placed, canvas: where the cells cover a canvas of which the picture takes only the top left
            part ``placed``, just that part is drawn. Both in the same pixels.
    """
    height, width = cells.shape[:2]
    canvas = canvas or (height, width)
    placed = placed or canvas
    index = []
    for n, out, part, whole in zip(cells.shape[:2], size, placed, canvas, strict=True):
        # Integer arithmetic: floor((i + 1/2) / out * part / whole * n).
        i = 2 * np.arange(out, dtype=np.int64) + 1
        index.append(np.minimum(i * part * n // (2 * out * whole), n - 1))
    # Columns first, while the rows are few.
    return cells.take(index[1], axis=1).take(index[0], axis=0)
