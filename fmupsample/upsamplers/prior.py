"""What place and colour of a neighbour say before anything is learned: joint bilateral upsampling.

Kopf et al. (2007): a neighbour weighs less with its distance from the pixel and with the difference
of the pixel's colour from the mean over the neighbour's cell. Both are added here as logarithms of
weights, Gaussians by default.

By place a neighbour may also count ``1 - (2 d / K)^2`` along each axis, d being the distance of the
pixel from the neighbour's centre. That is 0 where a whole cell leaves the K x K: no seam is left
there. For K = 3 it spreads about as much as a Gaussian of 0.75 cells that is cut off.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmupsample.layers.parts import InParts, cell_means
from fmupsample.ops.grid import neighbour_inside, squared_distance
from fmupsample.upsamplers.cells import WHOLE, Window, cell_products


class Prior:
    """Logits of K x K neighbours; ``-inf`` for those outside the map, always.

    Args:
        cells: ``(h, w)``; size: ``(H, W)`` of the whole map.
        taper: neighbours count less with their distance, down to nothing.
        sigma_space: of the Gaussian on that distance, in cells.
        guidance: ``[B, G, H, W]``, the whole map; with ``sigma_range``, neighbours are cells.
        sigma_range: of the Gaussian on differences of the guidance, Euclidean over its channels.
    """

    def __init__(
        self,
        kernel_size: int,
        cells: tuple[int, int],
        size: tuple[int, int],
        *,
        taper: bool = False,
        sigma_space: float | None = None,
        guidance: Tensor | InParts | None = None,
        sigma_range: float | None = None,
    ) -> None:
        self.kernel_size, self.cells, self.size = kernel_size, cells, size
        self.taper, self.sigma = taper, sigma_space
        self.guidance = guidance if sigma_range is not None else None
        if self.guidance is not None:
            mean = cell_means(self.guidance, cells)
            # Of |g - m|^2, the |g|^2 is the same for all neighbours: the softmax does not see it.
            self.colours = mean / sigma_range**2
            self.offset = -0.5 * (self.colours * mean).sum(1, keepdim=True)

    def weights(self, window: Window = WHOLE) -> Tensor:
        """What place and colour say alone: kernel weights ``[B, K*K, rows, columns]``."""
        return self._add_places(self._of_colours(window), window).softmax(1)

    def add(self, scores: Tensor, window: Window = WHOLE) -> Tensor:
        """``scores`` ``[B, K*K, rows, columns]`` of the window, changed in place."""
        if self.guidance is not None:
            scores += self._of_colours(window)
        return self._add_places(scores, window)

    def _of_colours(self, window: Window) -> Tensor:
        guidance = self.guidance[(..., *window)]
        return cell_products(
            guidance, self.colours, self.offset, self.kernel_size, self.size, window
        )

    def _add_places(self, scores: Tensor, window: Window) -> Tensor:
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
