"""What the place and the colour of a neighbour say before anything is learned.

Neighbours outside the picture are ruled out. Where the neighbours are whole cells, two Gaussians of
joint bilateral upsampling (Kopf et al. 2007) can be added to the learned scores: on the distance of
a pixel from the centre of the cell, and on how its colour differs from the mean over the cell. Of
the squared difference of the colours, ``|g - m|^2``, the ``|g|^2`` is the same for all neighbours:
the softmax does not see it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fmupsample.ops.grid import neighbour_inside, plan_axis, squared_distance
from fmupsample.upsamplers.resfu.config import ReSFUConfig


class Prior:
    """Added to the scores of a map, or of windows of it.

    Args:
        guidance: ``[B, G, H, W]`` of the whole map, before the stem; cells: ``(h, w)``.
    """

    def __init__(self, config: ReSFUConfig, guidance: Tensor, cells: tuple[int, int]) -> None:
        self.config, self.guidance, self.cells = config, guidance, cells
        self.size = guidance.shape[-2:]
        reach = config.kernel_size // 2
        self.offsets = range(-reach, reach + 1)
        self.low: Tensor | None = None
        if config.sigma_range is not None:
            # The colours first, as one would write them; then what does not depend on the pixel.
            mean = F.adaptive_avg_pool2d(guidance, cells) / config.sigma_range
            self.low = torch.cat([mean, -0.5 * mean.square().sum(1, keepdim=True)], 1)

    def add(
        self, scores: Tensor, window: tuple[slice, slice] = (slice(None), slice(None))
    ) -> Tensor:
        """``scores`` ``[B, K*K, rows, columns]`` of the window, changed in place."""
        down, across = (
            self._place(n, pixels, scores)[:, part]
            for n, pixels, part in zip(self.cells, self.size, window, strict=True)
        )  # [K, rows], [K, columns]
        grid = scores.unflatten(1, (self.config.kernel_size, -1))
        grid.add_(down[:, None, :, None]).add_(across[:, None, :])
        if self.low is not None:
            self._add_colours(grid, window)
        return scores

    def _place(self, cells: int, pixels: int, like: Tensor) -> Tensor:
        """Logits of the K neighbours along an axis, ``[K, pixels]``."""
        sigma, logits = self.config.sigma_space, []
        for offset in self.offsets:
            near = torch.zeros(pixels, dtype=torch.float64)
            if sigma is not None:
                near = squared_distance(cells, pixels, offset) / (-2 * sigma**2)
            inside = neighbour_inside(cells, pixels, offset)
            logits.append(near.masked_fill(~inside, float("-inf")))
        return torch.stack(logits).to(like.dtype).to(like.device)

    def _add_colours(self, grid: Tensor, window: tuple[slice, slice]) -> None:
        guidance = self.guidance[(..., *window)] / self.config.sigma_range
        rows, columns = (
            plan_axis(n, pixels, False).base[part].to(grid.device)
            for n, pixels, part in zip(self.cells, self.size, window, strict=True)
        )
        height, width = self.cells
        for i, dy in enumerate(self.offsets):
            band = self.low.index_select(2, (rows + dy).clamp(0, height - 1))
            for j, dx in enumerate(self.offsets):
                near = band.index_select(3, (columns + dx).clamp(0, width - 1))
                grid[:, i, j] += near[:, -1] + (guidance * near[:, :-1]).sum(1)
