"""Attention of pixels to a neighbourhood of cells, each head for its share of the channels.

As the authors have it: keys and values are enlarged to the size of the output (nearest), and a
pixel attends to K x K pixels that lie a cell's size apart, in a window that is moved inside at the
borders of the map (NATTEN's dilated neighbourhood attention). Here nothing is enlarged: along an
axis, these pixels are a few cells, and where the ratio is whole, the same for all pixels of a cell.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fmupsample.ops.grid import base_cells, table

# Bytes of the scores made at once on a processor, and on an accelerator.
_SCORE_BYTES = {"cpu": 4 << 20}
_SCORE_BYTES_ACCELERATOR = 256 << 20


@dataclass(frozen=True, eq=False)
class Axis:
    """The cells that the pixels of one axis attend to.

    Attributes:
        cells: int64 ``[groups, K]``, of runs of pixels in one cell with the same ones.
        starts: the first pixel of each run, and the number of pixels at the end.
        slots: int64 ``[groups * longest run]``, pixels laid out on as many slots for each run, the
            last ones of a shorter run idle.
        filled: int64 ``[pixels]``, where among the slots each pixel is.
    """

    cells: Tensor
    starts: tuple[int, ...]
    slots: Tensor
    filled: Tensor


@table
def plan(cells: int, pixels: int, kernel_size: int) -> Axis:
    """The axis for ``kernel_size`` neighbours, or as many as the map has."""
    near = neighbours(cells, pixels, kernel_size)
    # At the borders many cells share a window: runs end with the cell, so that all are as long.
    told_apart = torch.cat([near, base_cells(cells, pixels, False)[:, None]], 1)
    changes = (told_apart[1:] != told_apart[:-1]).any(1).nonzero().flatten() + 1
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), changes])
    lengths = torch.diff(starts, append=torch.tensor([pixels]))
    longest = int(lengths.max())
    slots = (starts[:, None] + torch.arange(longest)).clamp_max(pixels - 1).flatten()
    group = torch.repeat_interleave(torch.arange(len(starts)), lengths)
    filled = group * longest + torch.arange(pixels) - starts[group]
    return Axis(near[starts], (*starts.tolist(), pixels), slots, filled)


def neighbours(cells: int, pixels: int, kernel_size: int) -> Tensor:
    """int64 ``[pixels, K]``: the cells that each pixel attends to, ascending, some perhaps twice.

    Pixels with the same remainder modulo the dilation ``pixels // cells`` attend to one another, to
    the K nearest by their order; each stands for the cell it lies in.
    """
    dilation = pixels // cells
    pixel = torch.arange(pixels)
    remainder, order = pixel % dilation, pixel // dilation
    count = (pixels - remainder + dilation - 1) // dilation  # of pixels with this remainder
    k = min(kernel_size, pixels // dilation)
    first = (order - k // 2).clamp_min(0).minimum(count - k)
    near = (first[:, None] + torch.arange(k)) * dilation + remainder[:, None]
    return base_cells(cells, pixels, False)[near]


class NeighbourhoodAttention:
    """The output of one map, some rows at a time.

    Args:
        keys: ``[heads, D, h, w]``, scaled.
        values: ``[C, h, w]``, C a multiple of the heads.
        size: ``(H, W)`` of the output.
        kernel_size: K.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, size: tuple[int, int], kernel_size: int
    ) -> None:
        self._keys, self._values = keys, values.unflatten(0, (len(keys), -1))
        self._rows, self._columns = (
            plan(n, m, kernel_size) for n, m in zip(keys.shape[-2:], size, strict=True)
        )
        self._cells, self._slots, self._filled = (
            t.to(keys.device)
            for t in (self._columns.cells, self._columns.slots, self._columns.filled)
        )
        self._idle = len(self._slots) != size[1]

    def __call__(self, query: Tensor, rows: slice) -> Tensor:
        """``[C, rows, W]`` for the queries ``[E, rows, W]`` of these rows."""
        query = query.unflatten(0, (len(self._keys), -1))  # [heads, D, rows, W]
        if self._idle:
            query = query.index_select(3, self._slots)
        parts = []
        for near, part in self._parts(rows):
            inside = slice(part.start - rows.start, part.stop - rows.start)
            parts.append(self._part(query[:, :, inside], near))
        found = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        return found.index_select(2, self._filled) if self._idle else found

    def _parts(self, rows: slice) -> Iterator[tuple[Tensor, slice]]:
        """Runs of rows with the cells they all attend to, not too many for one product."""
        budget = _SCORE_BYTES.get(self._keys.device.type, _SCORE_BYTES_ACCELERATOR)
        window = self._rows.cells.shape[1] * self._cells.shape[1]
        row = len(self._slots) * len(self._keys) * window * self._keys.element_size()
        most = max(1, budget // row)
        starts = self._rows.starts
        for near, first, last in zip(self._rows.cells, starts[:-1], starts[1:], strict=True):
            for start in range(max(first, rows.start), min(last, rows.stop), most):
                yield near, slice(start, min(start + most, last, rows.stop))

    def _part(self, query: Tensor, near: Tensor) -> Tensor:
        """``[C, rows, slots]`` for rows that attend to the rows ``near`` of cells."""
        groups, rows = len(self._cells), query.shape[2]
        pixels = query.unflatten(3, (groups, -1)).permute(3, 0, 2, 4, 1)
        pixels = pixels.flatten(2, 3).flatten(0, 1)  # [groups heads, pixels, D]
        keys, values = (self._windows(t, near) for t in (self._keys, self._values))
        weights = torch.bmm(pixels, keys).softmax(2)  # [groups heads, pixels, K*K]
        found = torch.bmm(values, weights.transpose(1, 2))
        found = found.unflatten(0, (groups, -1)).unflatten(3, (rows, -1))
        return found.permute(1, 2, 3, 0, 4).flatten(3).flatten(0, 1)

    def _windows(self, x: Tensor, near: Tensor) -> Tensor:
        """``[heads, D, h, w]`` -> the cells of groups of columns, ``[groups heads, D, K*K]``."""
        band = x.index_select(2, near.to(x.device))
        return band[..., self._cells].permute(3, 0, 1, 2, 4).flatten(3).flatten(0, 1)
