"""What the place of a neighbour says: logits of K x K neighbours, none of those outside the map.

By the distance d of a pixel from a neighbour's centre: a Gaussian, or along each axis
``1 - (2 d / K)^2``, which is 0 where a whole cell leaves the K x K: no seam is left there. For
K = 3 it spreads about as much as a Gaussian of 0.75 cells that is cut off.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmupsample.ops.grid import neighbour_inside, squared_distance
from fmupsample.upsamplers.cells import WHOLE, Window


class Places:
    """Logits of the neighbours by their places, to be added to other scores.

    Args:
        cells: ``(h, w)``; size: ``(H, W)`` of the whole map.
        taper: neighbours count less with their distance, down to nothing.
        sigma: of the Gaussian, in cells.
    """

    def __init__(
        self,
        kernel_size: int,
        cells: tuple[int, int],
        size: tuple[int, int],
        *,
        taper: bool = False,
        sigma: float | None = None,
    ) -> None:
        self.kernel_size, self.cells, self.size = kernel_size, cells, size
        self.taper, self.sigma = taper, sigma

    def add(self, scores: Tensor, window: Window = WHOLE) -> Tensor:
        """``scores`` ``[B, K*K, rows, columns]`` of the window, changed in place."""
        down, across = (
            self._along(n, pixels, scores)[:, part]
            for n, pixels, part in zip(self.cells, self.size, window, strict=True)
        )  # [K, rows], [K, columns]
        grid = scores.unflatten(1, (self.kernel_size, -1))
        grid.add_(down[:, None, :, None]).add_(across[:, None, :])
        return scores

    def _along(self, cells: int, pixels: int, like: Tensor) -> Tensor:
        """Logits of the K neighbours along an axis, ``[K, pixels]``."""
        reach, logits = self.kernel_size // 2, []
        for offset in range(-reach, reach + 1):
            near = torch.zeros(pixels, dtype=torch.float64)
            if self.taper:
                share = squared_distance(cells, pixels, offset) * (2 / self.kernel_size) ** 2
                near = (1 - share).clamp_min(0).log()
            if self.sigma is not None:
                near = near + squared_distance(cells, pixels, offset) / (-2 * self.sigma**2)
            inside = neighbour_inside(cells, pixels, offset)
            logits.append(near.masked_fill(~inside, float("-inf")))
        return torch.stack(logits).to(like.dtype).to(like.device)
