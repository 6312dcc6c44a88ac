"""Attention of pixels to a neighbourhood of cells, each head for its share of the channels.

As the authors have it: keys and values are enlarged to the size of the output (nearest), and a
pixel attends to K x K pixels that lie a cell's size apart, in a window that is moved inside at the
borders of the map (NATTEN's dilated neighbourhood attention). Here nothing is enlarged: along an
axis, these pixels are a few cells, and where the ratio is whole, the same for all pixels of a cell.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmupsample.ops.grid import base_cells, constants
from fmupsample.upsamplers.encoders.runs import Runs, tables

# Bytes of the scores made at once on a processor, and on an accelerator.
_SCORE_BYTES = {"cpu": 4 << 20}
_SCORE_BYTES_ACCELERATOR = 256 << 20


@constants
def runs(cells: int, pixels: int, kernel_size: int) -> tuple:
    """What :class:`Runs` are made of, for ``kernel_size`` neighbours or as many as there are."""
    return tables(neighbours(cells, pixels, kernel_size), base_cells(cells, pixels, False))


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
            Runs(*runs(n, m, kernel_size)) for n, m in zip(keys.shape[-2:], size, strict=True)
        )
        self._cells, self._slots, self._filled = (
            t.to(keys.device)
            for t in (self._columns.cells, self._columns.slots, self._columns.filled)
        )

    def __call__(self, query: Tensor, rows: slice) -> Tensor:
        """``[C, rows, W]`` for the queries ``[E, rows, W]`` of these rows."""
        query = query.unflatten(0, (len(self._keys), -1))  # [heads, D, rows, W]
        if self._columns.idle:
            query = query.index_select(3, self._slots)
        budget = _SCORE_BYTES.get(self._keys.device.type, _SCORE_BYTES_ACCELERATOR)
        window = self._rows.cells.shape[1] * self._cells.shape[1]
        row = len(self._slots) * len(self._keys) * window * self._keys.element_size()
        parts = []
        for part in self._rows.parts(rows, max(1, budget // row)):
            inside = slice(part.start - rows.start, part.stop - rows.start)
            near = self._rows.cells[self._rows.run_of(part.start)]
            parts.append(self._part(query[:, :, inside], near))
        found = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        return found.index_select(2, self._filled) if self._columns.idle else found

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
