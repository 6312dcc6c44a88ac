"""Upsampling by convolution: deconvolution, and pixel shuffle.

Noh et al., "Learning Deconvolution Network for Semantic Segmentation" (ICCV 2015): a transposed
convolution. Shi et al., "Real-Time Single Image and Video Super-Resolution Using an Efficient
Sub-Pixel Convolutional Neural Network" (CVPR 2016): a convolution to r^2 C channels, shuffled.
Their kernels are the same everywhere. Both begin as an interpolation, from which training leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.errors import UsageError
from fmupsample.layers.norms import convolved
from fmupsample.upsamplers.complexity import Size, per_place
from fmupsample.upsamplers.config import Config
from fmupsample.upsamplers.learned import LearnedUpsampler


@dataclass(frozen=True)
class DeconvolutionConfig(Config):
    """Shape of a deconvolution."""

    ratio: int = 2  # r; the kernel has 2 r x 2 r taps
    groups: int = 1  # channels of a group are mixed; C: each alone

    def __post_init__(self) -> None:
        self.require_positive("ratio", "groups")
        if self.channels % self.groups:
            raise UsageError(f"DeconvolutionConfig: groups={self.groups} must divide the channels")
        if self.ratio % 2 and self.ratio > 1:
            raise UsageError("DeconvolutionConfig: the ratio must be even (taps are centred)")


@dataclass(frozen=True)
class PixelShuffleConfig(Config):
    """Shape of a sub-pixel convolution."""

    ratio: int = 2  # r
    kernel_size: int = 3  # odd

    def __post_init__(self) -> None:
        self.require_positive("ratio")
        self.require_odd("kernel_size")


class _Convolution(LearnedUpsampler):
    linear_in_value = False  # channels are mixed: only the features themselves can be upsampled
    fixed_ratio = 2
    uses_ops: ClassVar[bool] = False

    def forward(
        self, x: Tensor, guidance: Tensor | None = None, *, size: tuple[int, int] | None = None
    ) -> Tensor:
        height, width = self.check(x, guidance, size)
        return self._upsampled(x)[:, :, :height, :width]

    def macs(self, channels: int, cells: Size, pixels: Size) -> tuple[int, int]:
        """C^2 / groups (2 r)^2 LR, or C^2 r^2 k^2 LR."""
        return per_place(self.layer) * prod(cells), 0

    def _upsampled(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Deconvolution(_Convolution):
    """A transposed convolution, exactly r times; begins as bilinear interpolation."""

    name: ClassVar[str] = "deconvolution"

    def __init__(self, config: DeconvolutionConfig) -> None:
        super().__init__(config)
        c = config
        self.fixed_ratio = c.ratio
        self.layer = nn.ConvTranspose2d(
            c.channels, c.channels, 2 * c.ratio, c.ratio, c.ratio // 2, groups=c.groups
        )
        taps = 1 - (torch.arange(2 * c.ratio) - c.ratio + 0.5).abs() / c.ratio
        own = c.channels // c.groups
        with torch.no_grad():
            self.layer.weight.zero_()
            each = torch.arange(c.channels)
            self.layer.weight[each, each % own] = torch.outer(taps, taps)
            self.layer.bias.zero_()

    def _upsampled(self, x: Tensor) -> Tensor:
        # Replicated by a cell, so that the border has as many neighbours as the rest.
        r, layer = self.config.ratio, self.layer
        around = F.pad(x, (1, 1, 1, 1), mode="replicate")
        weight, bias = layer.weight.to(x), layer.bias.to(x)
        full = F.conv_transpose2d(
            around, weight, bias, layer.stride, layer.padding, groups=layer.groups
        )
        return full[:, :, r : r + x.shape[2] * r, r : r + x.shape[3] * r]


class PixelShuffle(_Convolution):
    """A convolution to r^2 C channels, shuffled, exactly r times; begins as nearest."""

    name: ClassVar[str] = "pixel-shuffle"

    def __init__(self, config: PixelShuffleConfig) -> None:
        super().__init__(config)
        c = config
        self.fixed_ratio = c.ratio
        k = c.kernel_size
        self.layer = nn.Conv2d(c.channels, c.channels * c.ratio**2, k)
        with torch.no_grad():
            self.layer.weight.zero_()
            each = torch.arange(c.channels * c.ratio**2)
            self.layer.weight[each, each // c.ratio**2, k // 2, k // 2] = 1
            self.layer.bias.zero_()

    def _upsampled(self, x: Tensor) -> Tensor:
        around = F.pad(x, (self.config.kernel_size // 2,) * 4, mode="replicate")
        return F.pixel_shuffle(convolved(around, self.layer), self.config.ratio)
