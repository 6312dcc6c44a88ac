"""Upsamplers without parameters and without guidance: what every other one is measured against."""

from __future__ import annotations

from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fmupsample.upsamplers.base import NeighbourUpsampler, Upsampler
from fmupsample.upsamplers.complexity import BICUBIC, BILINEAR, Size
from fmupsample.upsamplers.neighbours import in_cell


class _Interpolation(Upsampler):
    """One neighbour of weight 1 per pixel; the kind of neighbour is the method."""

    kernel_size: int = 1
    uses_ops: ClassVar[bool] = False
    macs_per_number: ClassVar[int] = 0

    def macs(self, channels: int, cells: Size, pixels: Size) -> tuple[int, int]:
        return 0, self.macs_per_number * channels * prod(pixels)

    def kernels(
        self, x: Tensor, guidance: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> Tensor:
        height, width = self.check(x, guidance, size)
        dtype = torch.promote_types(x.dtype, torch.float32)
        # A view of one number: the weights carry the size, and cost nothing.
        return torch.ones((), dtype=dtype, device=x.device).expand(x.shape[0], 1, height, width)


class Nearest(_Interpolation, NeighbourUpsampler):
    """Every pixel takes the features of the cell it lies in."""

    name: ClassVar[str] = "nearest"
    neighbours: str = "coarse"

    def reassemble(self, weights: Tensor, value: Tensor) -> Tensor:
        return in_cell(value, tuple(weights.shape[2:]))


class Bilinear(_Interpolation, NeighbourUpsampler):
    """Bilinear interpolation between cell centres (``align_corners=False``)."""

    name: ClassVar[str] = "bilinear"
    macs_per_number: ClassVar[int] = BILINEAR
    neighbours: str = "fine"

    def reassemble(self, weights: Tensor, value: Tensor) -> Tensor:
        return F.interpolate(value, size=weights.shape[2:], mode="bilinear", align_corners=False)


class Bicubic(_Interpolation):
    """Bicubic interpolation between cell centres (``align_corners=False``).

    Its weights sum to 1, but some are negative: results may leave the range of the features.
    """

    name: ClassVar[str] = "bicubic"
    macs_per_number: ClassVar[int] = BICUBIC

    def reassemble(self, weights: Tensor, value: Tensor) -> Tensor:
        return F.interpolate(value, size=weights.shape[2:], mode="bicubic", align_corners=False)
