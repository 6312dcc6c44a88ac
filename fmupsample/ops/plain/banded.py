"""Reassembly on CPUs: one matrix product per rectangle of pixels, written straight into the result.

A rectangle of rows and columns reads a small rectangle of cells. For each of its rows, the weights
are laid out as a matrix ``[cells, pixels]`` that is zero where a pixel does not read a cell; then
``[V, cells] x [cells, pixels]`` is a piece of the result, in place, with runs long enough for
memory to like. The zeros cost arithmetic, of which a CPU has plenty; what it lacks is bandwidth.

How the pixels of one axis share the cells is a small constant array, borders included (see
:mod:`.windows`), so that laying out the weights is a few multiplications and its adjoint the same
ones.

For finite values in float32 or float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt, prod

import torch
from torch import Tensor

from fmupsample.ops.memory import empty_map, map_format
from fmupsample.ops.plain.windows import column_windows, row_windows

# Bytes of the weights' matrices in one tile: about one core's L2 cache.
_TILE_BYTES = 2 << 20


def reassemble(value: Tensor, weights: Tensor, fractional: bool) -> Tensor:
    """See :func:`fmupsample.ops.reassembly.reassemble`."""
    out = empty_map(value, *weights.shape[2:])
    if out.numel() == 0:
        return out
    job = _Job(value, weights, fractional)
    write = _write_rows if job.channels_last else _write_blocks
    for tile in job.tiles():
        job.lay_out(weights, tile)
        write(job, tile, value, out)
    return out


def _write_blocks(job: _Job, tile: _Tile, value: Tensor, out: Tensor) -> None:
    """A tile of a contiguous map ``[B, V, H, W]``, block by block."""
    for block in job.blocks(tile):
        cells, pixels = block.cells(value), block.pixels(out)
        cells = cells.expand(len(pixels), -1, -1)
        torch.bmm(cells, block.matrix, out=pixels)


def _write_rows(job: _Job, tile: _Tile, value: Tensor, out: Tensor) -> None:
    """A tile of a channels-last map: all blocks of a row at once, since they lie in one piece."""
    cells = job.cells_of_blocks(tile, value)  # [J, K, V]
    y, x = job.pixel_box(tile)
    rows = out[tile.sample].permute(1, 2, 0)[y, x]  # [rows, W', V]
    whole, rest = divmod(rows.shape[1], job.columns.pixels)
    for row, matrices in zip(rows, job.matrices(tile).unbind(1), strict=True):
        if whole:
            blocks = row[: len(row) - rest].unflatten(0, (whole, -1))  # [J, n, V]
            torch.bmm(matrices[:whole].mT, cells[:whole], out=blocks)
        if rest:
            torch.mm(matrices[-1, :, :rest].T, cells[-1], out=row[len(row) - rest :])


def grad_value(grad: Tensor, weights: Tensor, h: int, w: int, fractional: bool) -> Tensor:
    """Gradient for the value map ``[B, V, h, w]``, in the dtype of ``grad``."""
    out = empty_map(grad, h, w).zero_()
    if grad.numel() == 0:
        return out
    job = _Job(out, weights, fractional)
    for tile in job.tiles():
        job.lay_out(weights, tile)
        for block in job.blocks(tile):
            window = block.window(out)
            share = torch.bmm(block.pixels(grad), block.matrix.mT).sum(0)  # [V, K]
            window += share.unflatten(1, window.shape[1:])
    return out


def grad_weights(grad: Tensor, value: Tensor, kernel_size: int, fractional: bool) -> Tensor:
    """Gradient for the weights ``[B, K*K, H, W]``, in at least float32."""
    out = grad.new_empty(grad.shape[0], kernel_size**2, *grad.shape[2:])
    if grad.numel() == 0:
        return out.zero_()
    job = _Job(value, out, fractional)
    for tile in job.tiles():
        for block in job.blocks(tile):
            pixels = block.pixels(grad)
            cells = block.cells(value).mT.expand(len(pixels), -1, -1)
            torch.bmm(cells, pixels, out=block.matrix)
        job.collect(out, tile)
    return out


@dataclass(frozen=True)
class _Tile:
    """Rows of one band, and some of its column blocks."""

    sample: int
    band: int
    columns: range


@dataclass(frozen=True)
class _Block:
    """One rectangle of pixels, the rectangle of cells it reads, and the weights between them.

    Attributes:
        matrix: ``[rows, K, columns]``, K the number of cells, row-major.
    """

    sample: int
    pixel_box: tuple[slice, slice]
    cell_box: tuple[slice, slice]
    matrix: Tensor

    def pixels(self, image: Tensor) -> Tensor:
        """View ``[rows, V, columns]`` of ``[B, V, H, W]``."""
        return image[self.sample][(slice(None), *self.pixel_box)].transpose(0, 1)

    def window(self, value: Tensor) -> Tensor:
        """View ``[V, cell rows, cell columns]`` of ``[B, V, h, w]``."""
        return value[self.sample][(slice(None), *self.cell_box)]

    def cells(self, value: Tensor) -> Tensor:
        """``[V, K]`` of ``[B, V, h, w]``, laid out like it."""
        window = self.window(value)
        if window.stride(0) == 1:
            return window.permute(1, 2, 0).flatten(0, 1).T
        return window.flatten(1)


class _Job:
    """The plan of one reassembly, and a buffer for the matrices of one tile."""

    def __init__(self, value: Tensor, weights: Tensor, fractional: bool):
        self.dtype = value.dtype
        self.channels_last = map_format(value) == torch.channels_last
        self.k = isqrt(weights.shape[1])
        self.samples = weights.shape[0]
        grid, size = tuple(value.shape[2:]), tuple(weights.shape[2:])
        self.rows = row_windows(grid[0], size[0], self.k, fractional)
        self.columns = column_windows(grid[1], size[1], self.k, fractional, self.channels_last)
        self.row_shares = self.rows.shares.to(self.dtype)
        self.column_shares = self.columns.shares.to(self.dtype)
        shape = (self.rows.pixels, self.rows.cells, self.columns.cells, self.columns.pixels)
        block_bytes = prod(shape) * value.element_size()
        blocks = max(1, min(_TILE_BYTES // block_bytes, self.columns.count))
        self.buffer = torch.empty(blocks, *shape, dtype=self.dtype)  # [J, R, cy, cx, n]
        # Pixels beyond the last column keep the weight zero.
        self.down = torch.zeros(
            shape[0], shape[1], self.k, blocks * shape[3], dtype=self.dtype
        )  # [R, cy, K, J n]

    def tiles(self) -> Iterator[_Tile]:
        step = len(self.buffer)
        for sample in range(self.samples):
            for band in range(self.rows.count):
                for first in range(0, self.columns.count, step):
                    last = min(first + step, self.columns.count)
                    yield _Tile(sample, band, range(first, last))

    def pixel_box(self, tile: _Tile) -> tuple[slice, slice]:
        """The tile's rows and columns of pixels."""
        first, last = (self.columns.pixel_slice(j) for j in (tile.columns[0], tile.columns[-1]))
        return self.rows.pixel_slice(tile.band), slice(first.start, last.stop)

    def matrices(self, tile: _Tile) -> Tensor:
        """The buffer as ``[J, rows, K, n]``: weights between K cells and n pixels."""
        y = self.rows.pixel_slice(tile.band)
        return self.buffer[: len(tile.columns), : y.stop - y.start].flatten(2, 3)

    def cells_of_blocks(self, tile: _Tile, value: Tensor) -> Tensor:
        """``[J, K, V]``: the cells that each block of the tile reads."""
        w = value.shape[3]
        y = torch.arange(self.rows.cells)[:, None] + self.rows.first[tile.band]
        x = torch.tensor([self.columns.first[j] for j in tile.columns])
        index = y * w + x[:, None, None] + torch.arange(self.columns.cells)  # [J, cy, cx]
        flat = value[tile.sample].flatten(1).T  # [h w, V]
        cells = flat.index_select(0, index.flatten())
        return cells.unflatten(0, (len(tile.columns), -1))

    def blocks(self, tile: _Tile) -> Iterator[_Block]:
        y, cell_y = self.rows.pixel_slice(tile.band), self.rows.cell_slice(tile.band)
        matrices = self.matrices(tile)
        for number, j in enumerate(tile.columns):
            x = self.columns.pixel_slice(j)
            matrix = matrices[number, :, :, : x.stop - x.start]
            yield _Block(tile.sample, (y, x), (cell_y, self.columns.cell_slice(j)), matrix)

    def lay_out(self, weights: Tensor, tile: _Tile) -> None:
        """Fill the buffer with the weights ``[B, K*K, H, W]`` on the cells that they stand for."""
        window = self._window(weights, tile).to(self.dtype)  # [rows, K, K, W']
        rows, width = window.shape[0], window.shape[3]
        down, matrices, column_shares = self._views(tile, rows)
        part = down[..., :width]
        shares = self.row_shares[tile.band, :, :, :rows]  # [K, cy, rows]
        for i in range(self.k):
            _add_product(part, window[:, None, i], shares[i].T[:, :, None, None], first=i == 0)
        spread = self._by_block(down, len(tile.columns))
        for j in range(self.k):
            _add_product(matrices, spread[:, :, :, j, None], column_shares[:, j], first=j == 0)

    def collect(self, weights: Tensor, tile: _Tile) -> None:
        """Adjoint of :meth:`lay_out`: from the buffer into the weights' gradient."""
        window = self._window(weights, tile)
        rows, width = window.shape[0], window.shape[3]
        down, matrices, column_shares = self._views(tile, rows)
        spread = self._by_block(down, len(tile.columns))
        for j in range(self.k):
            torch.sum(matrices * column_shares[:, j], 3, out=spread[:, :, :, j])
        part = down[..., :width]
        shares = self.row_shares[tile.band, :, :, :rows]
        for i in range(self.k):
            window[:, i] = (part * shares[i].T[:, :, None, None]).sum(1)

    def _window(self, weights: Tensor, tile: _Tile) -> Tensor:
        """The tile's weights, a view ``[rows, K, K, W']`` of ``[B, K*K, H, W]``."""
        y, x = self.pixel_box(tile)
        part = weights[tile.sample, :, y, x]
        return part.unflatten(0, (self.k, self.k)).permute(2, 0, 1, 3)

    def _views(self, tile: _Tile, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """The buffers in the tile's size: ``[rows, cy, K, J n]``, ``[J, rows, cy, cx, n]``; shares.

        The column shares are ``[J, K, 1, 1, cx, n]``.
        """
        count = len(tile.columns)
        shares = self.column_shares[tile.columns[0] : tile.columns[-1] + 1]
        down = self.down[:rows, :, :, : count * self.columns.pixels]
        return down, self.buffer[:count, :rows], shares[:, :, None, None]

    @staticmethod
    def _by_block(down: Tensor, blocks: int) -> Tensor:
        """``[rows, cy, K, J n]`` -> view ``[J, rows, cy, K, n]``."""
        return down.unflatten(3, (blocks, -1)).permute(3, 0, 1, 2, 4)


def _add_product(out: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    if first:
        torch.mul(a, b, out=out)
    else:
        out.addcmul_(a, b)
