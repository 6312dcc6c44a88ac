"""Upsamplers without parameters and without guidance: what every other one is measured against."""

from __future__ import annotations

from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fmupsample.ops import reassemble_at
from fmupsample.ops.grid import base_cells
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.complexity import BICUBIC, BILINEAR, Size


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


class Nearest(_Interpolation):
    """Every pixel takes the features of the cell it lies in."""

    name: ClassVar[str] = "nearest"
    neighbours: str = "coarse"

    def reassemble(self, weights: Tensor, value: Tensor) -> Tensor:
        rows = base_cells(value.shape[2], weights.shape[2], False).to(value.device)
        columns = base_cells(value.shape[3], weights.shape[3], False).to(value.device)
        return value.index_select(2, rows).index_select(3, columns)

    def reassemble_at(self, weights: Tensor, value: Tensor, pixels: Tensor) -> Tensor:
        return reassemble_at(value, weights, pixels, fractional=False)


class Bilinear(_Interpolation):
    """Bilinear interpolation between cell centres (``align_corners=False``)."""

    name: ClassVar[str] = "bilinear"
    macs_per_number: ClassVar[int] = BILINEAR
    neighbours: str = "fine"

    def reassemble(self, weights: Tensor, value: Tensor) -> Tensor:
        return F.interpolate(value, size=weights.shape[2:], mode="bilinear", align_corners=False)

    def reassemble_at(self, weights: Tensor, value: Tensor, pixels: Tensor) -> Tensor:
        return reassemble_at(value, weights, pixels, fractional=True)


class Bicubic(_Interpolation):
    """Bicubic interpolation between cell centres (``align_corners=False``).

    Its weights sum to 1, but some are negative: results may leave the range of the features.
    """

    name: ClassVar[str] = "bicubic"
    macs_per_number: ClassVar[int] = BICUBIC

    def reassemble(self, weights: Tensor, value: Tensor) -> Tensor:
        return F.interpolate(value, size=weights.shape[2:], mode="bicubic", align_corners=False)
