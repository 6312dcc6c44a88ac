"""The networks of NAF: an encoder of the image, and the rotary embedding of places."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.layers.chunks import recorded
from fmupsample.layers.norms import convolved
from fmupsample.upsamplers.encoders.networks import GROUPS, mirrored, normalised

_BASE = 100.0  # the ratio of the largest to the smallest period of the rotary embedding


class Block(nn.Module):
    """``conv2(SiLU(GN(conv1(SiLU(GN(x))))))``; there is no shortcut."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, channels)
        self.conv1 = nn.Conv2d(channels, channels, kernel_size)
        self.norm2 = nn.GroupNorm(GROUPS, channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size)


class Encoder(nn.Module):
    """A convolution and blocks; convolutions see the map mirrored at its borders."""

    def __init__(self, channels: int, kernel_size: int, blocks: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, kernel_size)
        self.blocks = nn.ModuleList(Block(channels, kernel_size) for _ in range(blocks))

    def layers(self) -> Iterator[tuple[nn.Conv2d, nn.GroupNorm | None]]:
        """The convolutions, each with the normalisation (and SiLU) before it."""
        yield self.first, None
        for block in self.blocks:
            yield block.conv1, block.norm1
            yield block.conv2, block.norm2

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in self.layers():
            if norm is not None:
                x = F.silu(normalised(norm, x))
            x = convolved(mirrored(x, layer.kernel_size[0] // 2), layer)
        return x


class Rotation(nn.Module):
    """Rotary embedding of the place: in each part, channel c and c + D/2 turn by the same angle.

    The first half of a part's angles is linear in the row, the second in the column; both go from
    -1 to 1 over the map.
    """

    def __init__(self, channels: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        quarter = channels // parts // 4
        periods = _BASE ** (torch.arange(quarter) / quarter)
        self.register_buffer("periods", periods)

    def forward(self, x: Tensor, rows: slice, size: tuple[int, int]) -> Tensor:
        """Rows ``[..., E, rows, W]`` of a map of this size, turned; overwritten if possible."""
        down, across = (self._angles(n, x) for n in size)  # [D/4, H], [D/4, W]
        angles = (down[:, rows, None], across[:, None])
        pairs = x.unflatten(-3, (self.parts, 2, 2, -1))  # [..., parts, pair, axis, D/4, rows, W]
        if recorded(x):
            shape = (*angles[0].shape[:2], size[1])
            angle = torch.stack([a.expand(shape) for a in angles])
            cos, sin, (first, second) = angle.cos(), angle.sin(), pairs.unbind(-5)
            turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -5)
            return turned.flatten(-6, -3)
        for axis, angle in enumerate(angles):
            cos, sin = angle.cos(), angle.sin()
            first, second = pairs[..., axis, :, :, :].unbind(-4)
            before = first.clone()
            first.mul_(cos).addcmul_(second, sin, value=-1)
            second.mul_(cos).addcmul_(before, sin)
        return x

    def _angles(self, pixels: int, like: Tensor) -> Tensor:
        place = torch.arange(0.5, pixels, dtype=like.dtype, device=like.device) / pixels
        return 2 * math.pi * (2 * place - 1) / self.periods.to(like)[:, None]
