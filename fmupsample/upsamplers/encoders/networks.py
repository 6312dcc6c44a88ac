"""The networks that AnyUp and JAFAR are made of, in plain layers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.layers.chunks import recorded
from fmupsample.layers.norms import convolved

GROUPS = 8  # of every group normalisation
_THETA = 100.0  # the ratio of the largest to the smallest frequency of the rotary embedding


def mirrored(x: Tensor, reach: int) -> Tensor:
    """``[B, C, H, W]`` with as many rows and columns more at every side, mirrored at the border."""
    for dim in (2, 3) if reach else ():
        # One row or column cannot be mirrored.
        mode = "reflect" if x.shape[dim] > reach else "replicate"
        x = F.pad(x, (0, 0, reach, reach) if dim == 2 else (reach, reach, 0, 0), mode=mode)
    return x


class ResidualBlock(nn.Module):
    """``x + conv2(SiLU(GN(conv1(SiLU(GN(x))))))``, both convolutions 1x1 without bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, channels)
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, channels)
        self.conv2 = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = convolved(F.silu(normalised(self.norm1, x)), self.conv1)
        return x + convolved(F.silu(normalised(self.norm2, hidden)), self.conv2)


class Encoder(nn.Module):
    """A convolution and two residual blocks.

    A 3x3 convolution sees the map mirrored at its borders.
    """

    def __init__(self, inputs: int, channels: int, kernel_size: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, channels, kernel_size, bias=False)
        self.blocks = nn.ModuleList(ResidualBlock(channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = convolved(mirrored(x, self.first.kernel_size[0] // 2), self.first)
        for block in self.blocks:
            x = block(x)
        return x


class Rotation(nn.Module):
    """Rotary embedding of the place: channel c and c + E/2 turn by angles linear in it.

    Rows and columns are counted from 0 to 1, from the first pixel to the last.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        quarter = channels // 4
        steps = torch.arange(quarter) / max(1, quarter - 1)
        frequencies = torch.zeros(2, channels)
        # Half of the channels follow the rows, half of them the columns.
        for axis, first in enumerate((0, channels - 2 * quarter)):
            frequencies[axis, first : first + 2 * quarter] = (_THETA**-steps).repeat(2)
        self.frequencies = nn.Parameter(2 * math.pi * frequencies)

    def angles(self, size: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
        """What rows and columns add to the angles: ``[E, H]`` and ``[E, W]``."""
        down, across = (torch.linspace(0, 1, n, dtype=like.dtype, device=like.device) for n in size)
        rows, columns = self.frequencies.to(like)
        return rows[:, None] * down, columns[:, None] * across

    def forward(self, x: Tensor) -> Tensor:
        down, across = self.angles((x.shape[-2], x.shape[-1]), x)
        angle = down[:, :, None] + across[:, None]
        return rotated(x, angle.cos(), angle.sin())


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of channels of ``[..., E, H, W]`` by angles of these cosines and sines."""
    first, second = x.chunk(2, -3)
    if recorded(x, cos):
        return x * cos + torch.cat([-second, first], -3) * sin
    out, half = x * cos, first.shape[-3]
    out[..., :half, :, :].addcmul_(second, sin[:half], value=-1)
    out[..., half:, :, :].addcmul_(first, sin[half:])
    return out


def root_mean_square_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMS normalisation over dimension 1, with PyTorch's default epsilon for the dtype."""
    eps = torch.finfo(x.dtype).eps
    shape = (-1, *(1,) * (x.ndim - 2))
    scale = (x.square().mean(1, keepdim=True) + eps).rsqrt()
    return x * scale * weight.to(x).view(shape)


def normalised(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """The normalisation, its parameters in the dtype of ``x``."""
    return F.group_norm(x, norm.num_groups, norm.weight.to(x), norm.bias.to(x), norm.eps)
