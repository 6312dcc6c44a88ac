"""What the place and the colour of a neighbour say before anything is learned.

Neighbours outside the picture are ruled out. Where the neighbours are whole cells, logarithms of
weights by place and by colour can be added to the learned scores, as in joint bilateral upsampling
(Kopf et al. 2007).

By place: a Gaussian on the distance d of a pixel from the centre of the cell, or along each axis
``1 - (2 d / K)^2``, which is 0 where the cell leaves the K x K: no seam is left there. For K = 3 it
spreads about as much as a Gaussian of 0.75 cells that is cut off. By colour: a Gaussian on how the
pixel differs from the mean over the cell. Of ``|g - m|^2`` the ``|g|^2`` is the same for all
neighbours: the softmax does not see it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmupsample.layers.parts import InParts, cell_means
from fmupsample.ops.grid import neighbour_inside, squared_distance
from fmupsample.upsamplers.cells import WHOLE, Window, cell_products
from fmupsample.upsamplers.resfu.config import ReSFUConfig


class Prior:
    """Added to the scores of a map, or of windows of it.

    Args:
        guidance: ``[B, G, H, W]`` of the whole map, before the stem; cells: ``(h, w)``.
    """

    def __init__(
        self, config: ReSFUConfig, guidance: Tensor | InParts, cells: tuple[int, int]
    ) -> None:
        self.config, self.guidance, self.cells = config, guidance, cells
        self.size = guidance.shape[-2:]
        reach = config.kernel_size // 2
        self.offsets = range(-reach, reach + 1)
        self.colours: Tensor | None = None
        if config.sigma_range is not None:
            mean = cell_means(guidance, cells)
            self.colours = mean / config.sigma_range**2
            self.offset = -0.5 * (self.colours * mean).sum(1, keepdim=True)

    def add(self, scores: Tensor, window: Window = WHOLE) -> Tensor:
        """``scores`` ``[B, K*K, rows, columns]`` of the window, changed in place."""
        down, across = (
            self._place(n, pixels, scores)[:, part]
            for n, pixels, part in zip(self.cells, self.size, window, strict=True)
        )  # [K, rows], [K, columns]
        grid = scores.unflatten(1, (self.config.kernel_size, -1))
        grid.add_(down[:, None, :, None]).add_(across[:, None, :])
        if self.colours is not None:
            guidance = self.guidance[(..., *window)]
            cell_products(
                guidance, self.colours, self.offset, self.config.kernel_size, self.size, window,
                onto=scores,
            )  # fmt: skip
        return scores

    def _place(self, cells: int, pixels: int, like: Tensor) -> Tensor:
        """Logits of the K neighbours along an axis, ``[K, pixels]``."""
        c, logits = self.config, []
        for offset in self.offsets:
            near = torch.zeros(pixels, dtype=torch.float64)
            if c.taper:
                share = squared_distance(cells, pixels, offset) * (2 / c.kernel_size) ** 2
                near = (1 - share).clamp_min(0).log()
            if c.sigma_space is not None:
                near = near + squared_distance(cells, pixels, offset) / (-2 * c.sigma_space**2)
            inside = neighbour_inside(cells, pixels, offset)
            logits.append(near.masked_fill(~inside, float("-inf")))
        return torch.stack(logits).to(like.dtype).to(like.device)
