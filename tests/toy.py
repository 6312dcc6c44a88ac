"""A backbone and an upsampler small enough for tests of what stands around them.

The "features" are patch averages of smooth functions of colour, so that equal colours have equal
features; the upsampler weighs a 3 x 3 neighbourhood by likeness of colour (its weights sum to 1).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.upsamplers.base import Upsampler


class ToyBackbone(nn.Module):
    """By default 16 channels per 8 x 8 pixels; looks like a
    :class:`fmupsample.backbones.Backbone`."""

    architecture = "toy"
    fixed_size = None
    default_image_size = 64
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    layer = 11

    def __init__(self, channels: int = 16, stride: int = 8, name: str = "toy.v1") -> None:
        super().__init__()
        self.channels, self.stride, self.name = channels, (stride, stride), name
        self.size_multiple = (stride, stride)
        self.fingerprint = "0123456789ab" if name == "toy.v1" else f"of {name}"
        g = torch.Generator().manual_seed(7)
        self.mix = nn.Parameter(torch.randn(channels, 9, generator=g), requires_grad=False)
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += len(images)
        x = F.avg_pool2d(images, self.stride)
        x = torch.cat([x, x**2, x.roll(1, dims=1) * x], dim=1)
        return torch.einsum("cd,bdhw->bchw", self.mix, x)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // self.stride[0], size[1] // self.stride[1]


class ToyUpsampler(Upsampler):
    """Softmax over 9 neighbours' colour distance to the pixel."""

    name: ClassVar[str] = "toy"
    needs_guidance = True
    fingerprint = "toy"

    def kernels(self, x: Tensor, guidance: Tensor | None = None, size=None) -> Tensor:
        size = self.check(x, guidance, size)
        fine = F.interpolate(guidance, size, mode="bilinear", align_corners=False)
        coarse = F.adaptive_avg_pool2d(guidance, x.shape[-2:])
        near = self._neighbours(coarse, size)  # [B, 3, 9, H, W]
        return (-4 * (near - fine[:, :, None]).square().sum(1)).softmax(1)

    def reassemble(self, weights: Tensor, value: Tensor) -> Tensor:
        near = self._neighbours(value, weights.shape[-2:])
        return (near * weights[:, None]).sum(2)

    @staticmethod
    def _neighbours(x: Tensor, size: tuple[int, int]) -> Tensor:
        b, c, h, w = x.shape
        nine = F.unfold(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3).reshape(b, c * 9, h, w)
        return F.interpolate(nine, size, mode="nearest").reshape(b, c, 9, *size)


class ToyNonlinear(ToyUpsampler):
    """The same result as :class:`ToyUpsampler`, but it claims to need the features whole."""

    name = "toy-nonlinear"
    linear_in_value = False

    def forward(self, x: Tensor, guidance: Tensor | None = None, *, size=None) -> Tensor:
        return super().reassemble(super().kernels(x, guidance, size), x)

    def kernels(self, *_: object) -> Tensor:
        raise AssertionError("not for this one")

    reassemble = kernels
