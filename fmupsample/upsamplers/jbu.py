"""Joint bilateral upsampling: edge-aware, without training."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fmupsample.errors import UsageError
from fmupsample.layers.parts import InParts, cell_means, in_parts
from fmupsample.ops import reassemble, reassemble_at
from fmupsample.ops.grid import base_cells, cell_inside, squared_distance
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.complexity import Size

_Axis = tuple[list[Tensor], list[Tensor], list[Tensor]]


class JointBilateral(Upsampler):
    """Joint bilateral upsampling, Kopf et al. (2007).

    A pixel averages the K x K cells around the one it lies in, weighted by their distance and by
    how much the pixel's guidance differs from the cell's (the mean of the guidance over the cell).
    With the normalised picture as guidance it sharpens any features at colour edges.

    Args:
        kernel_size: K, odd.
        sigma_space: of the Gaussian on distance, in LR cells.
        sigma_range: of the Gaussian on guidance differences (Euclidean over the channels), in units
            of the guidance; for a normalised picture about 4.5 times units of RGB in 0..1.
    """

    name: ClassVar[str] = "jbu"
    needs_guidance: ClassVar[bool] = True
    neighbours: str = "coarse"
    bytes_per_pixel: ClassVar[int] = 500

    def __init__(
        self, kernel_size: int = 5, sigma_space: float = 0.75, sigma_range: float = 0.6
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise UsageError(f"jbu: kernel_size must be odd and positive, not {kernel_size}")
        if sigma_space <= 0 or sigma_range <= 0:
            raise UsageError("jbu: sigma_space and sigma_range must be positive")
        self.kernel_size = kernel_size
        self.sigma_space = sigma_space
        self.sigma_range = sigma_range

    def macs(self, channels: int, cells: Size, pixels: Size) -> tuple[int, int]:
        return 0, (3 + channels) * self.kernel_size**2 * prod(pixels)

    def options(self) -> dict[str, Any]:
        names = ("kernel_size", "sigma_space", "sigma_range")
        return {name: getattr(self, name) for name in names}

    def kernels(
        self, x: Tensor, guidance: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Weights ``[B, K*K, H, W]``; zero where a neighbour lies outside the picture."""
        size = self.check(x, guidance, size)
        guidance, low = self._maps(x, guidance, size)
        down, across = (
            self._axis(n, pixels, guidance) for n, pixels in zip(x.shape[-2:], size, strict=True)
        )
        return self._weights(guidance, low, down, across)

    def kernels_in_rows(
        self, x: Tensor, guidance: Tensor | InParts | None, size: tuple[int, int], pixels: int
    ) -> Iterator[Tensor]:
        size = self.check(x, guidance if guidance is None else in_parts(guidance).like, size)
        with torch.no_grad():
            guidance, low = self._maps(x, guidance, size)
        down, across = (
            self._axis(n, pixels, low) for n, pixels in zip(x.shape[-2:], size, strict=True)
        )
        step = max(1, pixels // (len(x) * size[1]))
        weights = torch.no_grad()(self._weights)
        for y in range(0, size[0], step):
            rows = tuple([t[y : y + step] for t in part] for part in down)
            yield weights(guidance[:, :, y : y + step], low, rows, across)

    def _maps(
        self, x: Tensor, guidance: Tensor | InParts | None, size: tuple[int, int]
    ) -> tuple[Tensor | InParts, Tensor]:
        """The guidance at the output's size, and its mean over each cell."""
        assert guidance is not None  # checked before: needs_guidance
        guidance = guidance.to(torch.promote_types(x.dtype, torch.float32))
        low = cell_means(guidance, x.shape[-2:])
        if guidance.shape[-2:] != size:
            guidance = F.interpolate(
                guidance[...], size, mode="bilinear", align_corners=False, antialias=True
            )
        return guidance, low

    def _weights(self, guidance: Tensor, low: Tensor, down: _Axis, across: _Axis) -> Tensor:
        """Of the rows that ``guidance`` and ``down`` hold."""
        rows, row_logits, row_inside = down
        columns, column_logits, column_inside = across
        scores = []
        for i in range(self.kernel_size):
            band = low.index_select(2, rows[i])
            for j in range(self.kernel_size):
                difference = guidance - band.index_select(3, columns[j])
                score = difference.square().sum(1) / (-2 * self.sigma_range**2)
                score = score + row_logits[i][:, None] + column_logits[j]
                inside = row_inside[i][:, None] & column_inside[j]
                scores.append(score.masked_fill(~inside, float("-inf")))
        return torch.stack(scores, 1).softmax(1)

    def reassemble(self, weights: Tensor, value: Tensor) -> Tensor:
        """Weighted whole cells around the cell a pixel lies in."""
        return reassemble(value, weights, fractional=False)

    def reassemble_at(self, weights: Tensor, value: Tensor, pixels: Tensor) -> Tensor:
        return reassemble_at(value, weights, pixels, fractional=False)

    def _axis(self, cells: int, pixels: int, like: Tensor) -> _Axis:
        """Per offset, for every pixel of an axis: the cell, its spatial logit, is it inside."""
        base = base_cells(cells, pixels, False)
        found: _Axis = ([], [], [])
        reach = self.kernel_size // 2
        for offset in range(-reach, reach + 1):
            logit = squared_distance(cells, pixels, offset) / (-2 * self.sigma_space**2)
            found[0].append((base + offset).clamp(0, cells - 1).to(like.device))
            found[1].append(logit.to(like.dtype).to(like.device))
            found[2].append(cell_inside(cells, pixels, offset).to(like.device))
        return found
