"""The networks of AnyUp: encoders of the image, and filters that any features can pass through."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.layers.chunks import recorded
from fmupsample.layers.norms import convolved
from fmupsample.upsamplers.anyup.config import GROUPS

# Bytes of the filters' responses to a few channels of the features.
_RESPONSE_BYTES = 8 << 20
_THETA = 100.0  # the ratio of the largest to the smallest frequency of the rotary embedding


class ResidualBlock(nn.Module):
    """``x + conv2(SiLU(GN(conv1(SiLU(GN(x))))))``, both convolutions 1x1 without bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, channels)
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, channels)
        self.conv2 = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = convolved(F.silu(_normalised(self.norm1, x)), self.conv1)
        return x + convolved(F.silu(_normalised(self.norm2, hidden)), self.conv2)


class Encoder(nn.Module):
    """A convolution and two residual blocks.

    A 3x3 convolution sees the map mirrored at its borders.
    """

    def __init__(self, inputs: int, channels: int, kernel_size: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, channels, kernel_size, bias=False)
        self.blocks = nn.ModuleList(ResidualBlock(channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        reach = self.first.kernel_size[0] // 2
        for dim in (2, 3) if reach else ():
            # One row or column cannot be mirrored.
            mode = "reflect" if x.shape[dim] > reach else "replicate"
            x = F.pad(x, (0, 0, reach, reach) if dim == 2 else (reach, reach, 0, 0), mode=mode)
        x = convolved(x, self.first)
        for block in self.blocks:
            x = block(x)
        return x


class FeatureEncoder(nn.Module):
    """Features of any number of channels -> ``[B, E, h, w]``.

    Each channel passes the same E filters, a softmax compares their responses, and its mean over
    channels describes a cell. The official implementation takes the C x E responses, ordered by
    channel and then filter, for E x C ones: the softmax runs over every C-th of that sequence, and
    the mean over C successive ones. The published weights are trained with that order, and so it is
    the order here. Two residual blocks follow.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.filters = nn.Parameter(torch.randn(channels, 1, kernel_size, kernel_size))
        self.blocks = nn.ModuleList(ResidualBlock(channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.described(x)
        for block in self.blocks:
            x = block(x)
        return x

    def described(self, x: Tensor) -> Tensor:
        """The mean of the softmax of the filters' responses, ``[B, C, h, w]`` -> ``[B, E, h, w]``.

        Responses are divided by how many cells of the filter lie inside the map.
        """
        (_, channels, h, w), side = x.shape, self.filters.shape[-1]
        filters = self.filters.to(x).flatten(1).T  # [side^2, E]
        pad = (side // 2,) * 4
        inside = F.pad(x.new_ones(1, 1, h, w), pad)
        inside = F.avg_pool2d(inside, side, stride=1, divisor_override=1)[0, 0, :, :, None, None]
        windows = F.pad(x, pad).unfold(2, side, 1).unfold(3, side, 1)  # [B, C, h, w, side, side]
        row = channels * w * filters.shape[1] * x.element_size()
        step = max(1, _RESPONSE_BYTES // row)
        bands = []
        for y in range(0, h, step):
            part = windows[:, :, y : y + step].permute(0, 2, 3, 1, 4, 5)
            patches = part.flatten(4) / inside[y : y + step]  # [B, rows, w, C, side^2]
            responses = torch.matmul(patches, filters).flatten(3).unflatten(3, (-1, channels))
            bands.append(_mean_softmax(responses))
        return torch.cat(bands, 1).permute(0, 3, 1, 2)


def _mean_softmax(x: Tensor) -> Tensor:
    """Softmax over the second last dimension, averaged over the last."""
    if recorded(x):
        return x.softmax(-2).mean(-1)
    x = x.sub_(x.amax(-2, keepdim=True)).exp_()
    share = (x.sum(-2) * x.shape[-1]).reciprocal_()
    return torch.matmul(x, share[..., None])[..., 0]


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


def _normalised(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x, norm.num_groups, norm.weight.to(x), norm.bias.to(x), norm.eps)
