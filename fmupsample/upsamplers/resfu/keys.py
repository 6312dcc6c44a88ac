"""The keys of one pair, and their convolution as the scores ask for it: a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fmupsample.ops.grid import base_cell, interpolation_part

# (first row, last row + 1, where to put it if anywhere) -> [B M, rows, W].
KeyTerm = Callable[[int, int, Tensor | None], Tensor]


def neighbour_stride(size: tuple[int, int], cells: tuple[int, int]) -> tuple[int, int]:
    """Pixels from one neighbour to the next: at ratios that are not whole, the nearest step."""
    return tuple(max(1, round(n / m)) for n, m in zip(size, cells, strict=True))


@dataclass(frozen=True)
class UpsampledKeys:
    """Keys at low resolution, convolved there, to be upsampled bilinearly.

    Neighbours s output pixels apart are neighbouring cells at low resolution, so convolving there
    (dilation 1) and upsampling afterwards is the same: with the map replicate-padded enough, also
    at the borders, and at every ratio.

    Attributes:
        low: ``[B, M, h+2, w+2]``, the convolution on a map larger by one cell on every side.
        size: ``(H, W)`` of the output.
        window: the rows and columns of it that are wanted; ``None``: all.
    """

    low: Tensor
    size: tuple[int, int]
    window: tuple[slice, slice] | None = None

    @property
    def source(self) -> Tensor:
        """The tensor that the terms are made from."""
        return self.low

    @property
    def windowed(self) -> bool:
        """Whether this is a part of the output."""
        return self.window is not None

    def term(self, constant: Tensor, dtype: torch.dtype) -> KeyTerm:
        """The convolution plus ``constant`` ``[B, M]``, in ``dtype``."""
        low, (height, width) = self.low, self.size
        h, w = (n - 2 for n in low.shape[2:])
        rows, columns = self.window or (slice(0, height), slice(0, width))
        start, stop, _ = rows.indices(height)
        top = base_cell(start, h, height, True) + 1
        bottom = base_cell(stop - 1, h, height, True) + 3
        # Rows of interpolation matrices sum to 1: what is added here is added to every pixel.
        cells, ux = interpolation_part(w, width, torch.arange(width)[columns], 1)
        across = (low[:, :, top:bottom, cells] + constant[:, :, None, None]) @ ux.to(low).T
        across = across.flatten(0, 1).to(dtype)
        known, down = interpolation_part(h, height, torch.arange(height)[rows], 1)
        down = down[:, top - known.start : bottom - known.start].to(across)

        def term(y0: int, y1: int, out: Tensor | None) -> Tensor:
            first = base_cell(start + y0, h, height, True) + 1 - top
            last = base_cell(start + y1 - 1, h, height, True) + 3 - top
            some = down[y0:y1, first:last].expand(len(across), -1, -1)
            return torch.bmm(some, across[:, first:last], out=out)

        return term


@dataclass(frozen=True)
class FullKeys:
    """Keys at full resolution, neighbours ``stride`` pixels apart.

    Attributes:
        key: ``[B, E, H, W]``.
        weight: ``[B, M, E/groups, K, K]``, the key's normalisation folded in.
        offset: ``[B, M]``, what that leaves to add.
        groups: of the convolution.
        windowed: the key holds the neighbours around the output's pixels already.
    """

    key: Tensor
    weight: Tensor
    offset: Tensor
    groups: int
    stride: tuple[int, int]
    windowed: bool = False

    @property
    def source(self) -> Tensor:
        """The tensor that the terms are made from."""
        return self.key

    def term(self, constant: Tensor, dtype: torch.dtype) -> KeyTerm:
        """The convolution plus ``constant`` ``[B, M]``, in ``dtype``."""
        batch, reach = self.key.shape[0], self.weight.shape[-1] // 2
        pad_y, pad_x = (s * reach for s in self.stride)
        padded = self.key.to(dtype)
        if not self.windowed:
            padded = F.pad(padded, (pad_x, pad_x, pad_y, pad_y), mode="replicate")
        weight = self.weight.flatten(0, 1).to(dtype)
        bias = (self.offset + constant).flatten().to(dtype)

        def term(y0: int, y1: int, out: Tensor | None) -> Tensor:
            # One convolution for the whole batch: samples become groups.
            rows = padded[:, :, y0 : y1 + 2 * pad_y]
            return F.conv2d(
                rows.reshape(1, -1, *rows.shape[2:]),
                weight,
                bias,
                dilation=self.stride,
                groups=batch * self.groups,
            ).squeeze(0)

        return term


Keys = UpsampledKeys | FullKeys
