"""Reassembly and its gradients in plain PyTorch: batched matrix products, tile by tile.

Two exact identities make reassembly a batched matrix product. The samples of one pixel share a
fraction, so K x K weights merge into (K+1) x (K+1) weights on whole cells. And all pixels between
four neighbouring cell centres (for integer neighbours: inside one cell) read the same cells, so
each such group is one product ``[V, taps] x [taps, pixels]``. Rows of groups are taken a few at a
time to stay in cache and to bound the extra memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from fmupsample.ops.grid import AxisPlan, plan_axis
from fmupsample.ops.memory import empty_map

# Bytes of the intermediate product per tile: on a CPU about one core's L2 cache, on an accelerator
# enough to fill it.
_TILE_BYTES = {"cpu": 2 << 20}
_TILE_BYTES_ACCELERATOR = 256 << 20
_MAX_BLOCKS = 64

Axes = tuple[AxisPlan, AxisPlan]  # of rows and columns of pixels


def reassemble(
    value: Tensor, weights: Tensor, fractional: bool, axes: Axes | None = None
) -> Tensor:
    """See :func:`fmupsample.ops.reassembly.reassemble`.

    ``axes``: the plans of the rows and columns that ``weights`` are of, where these are a part of
    a larger map's.
    """
    out = empty_map(value, *weights.shape[2:])
    if out.numel() == 0:
        return out
    job = _Job(value, weights, fractional, axes)
    for b, tile in job.tiles():
        product = torch.bmm(job.patches(b, tile), job.merged_weights(b, tile))
        job.from_groups(tile, product, job.rows_of(out[b], tile))
    return out


def grad_value(grad: Tensor, weights: Tensor, h: int, w: int, fractional: bool) -> Tensor:
    """Gradient for the value map ``[B, V, h, w]``, in the dtype of ``grad``."""
    value = empty_map(grad, h, w).zero_()
    if grad.numel() == 0:
        return value
    job = _Job(value, weights, fractional)
    padded = torch.zeros_like(job.padded)
    for b, tile in job.tiles():
        groups = job.to_groups(tile, job.rows_of(grad[b], tile))
        merged = job.merged_weights(b, tile)
        job.add_patches(padded[b], tile, torch.bmm(groups, merged.transpose(1, 2)))
    return value.copy_(job.unpad(padded))


def grad_weights(
    grad: Tensor, value: Tensor, kernel_size: int, fractional: bool, axes: Axes | None = None
) -> Tensor:
    """Gradient for the weights ``[B, K*K, H, W]``, in at least float32; ``axes`` as above."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    out = grad.new_zeros(grad.shape[0], kernel_size**2, *grad.shape[2:], dtype=dtype)
    if grad.numel() == 0:
        return out
    job = _Job(value, out, fractional, axes)
    for b, tile in job.tiles():
        groups = job.to_groups(tile, job.rows_of(grad[b], tile))
        merged = torch.bmm(job.patches(b, tile).transpose(1, 2), groups)
        job.unmerge(merged, tile, job.rows_of(out[b], tile))
    return out


class _Job:
    """One reassembly: the padded value map, and the moves between pixel and group layout.

    A *tile* is a range of group rows ``(g0, g1)``. Inside a tile the batched product runs over
    its groups, ``G = (g1 - g0) * columns``; ``S`` is the number of pixel slots in a group and
    ``T`` the number of cells it reads.
    """

    def __init__(
        self, value: Tensor, weights: Tensor, fractional: bool, axes: Axes | None = None
    ) -> None:
        self.weights = weights
        self.dtype, self.device = value.dtype, value.device
        # Arithmetic on weights happens in at least float32, whatever the value's dtype.
        self.weight_dtype = torch.promote_types(weights.dtype, torch.float32)
        self.fractional = fractional
        self.k = isqrt(weights.shape[1])
        self.taps = self.k + 1 if fractional else self.k  # cells read along one axis
        # Plans of a part of the pixels read no more cells than that part needs.
        self.rows, self.columns = axes or (
            plan_axis(value.shape[dim], weights.shape[dim], fractional) for dim in (2, 3)
        )
        self.pad_y, self.pad_x = self._padding(self.rows), self._padding(self.columns)
        self.padded = _replicate_pad(value, self.pad_y, self.pad_x)
        if fractional:
            self.fy = self.rows.fraction.to(self.device, self.weight_dtype)[:, None]
            self.fx = self.columns.fraction.to(self.device, self.weight_dtype)

    def _padding(self, axis: AxisPlan) -> tuple[int, int]:
        """Cells to add before and after, so that every group reads inside the padded map.

        Negative where cells there are not read at all.
        """
        first = axis.first - self.k // 2
        last = first + axis.groups - 1 + self.taps - 1
        return -first, last - (axis.cells - 1)

    def tiles(self) -> Iterator[tuple[int, tuple[int, int]]]:
        """(batch index, group rows) of every tile."""
        batch, channels = self.padded.shape[:2]
        # The widest intermediates of a group row are the product and the weights in float32.
        pixels = self.columns.groups * self.columns.slots * self.rows.slots
        width = pixels * max(channels * self.padded.element_size(), 4 * self.taps**2)
        step = max(1, _TILE_BYTES.get(self.device.type, _TILE_BYTES_ACCELERATOR) // width)
        for b in range(batch):
            for g in range(0, self.rows.groups, step):
                yield b, (g, min(g + step, self.rows.groups))

    def rows_of(self, image: Tensor, tile: tuple[int, int]) -> Tensor:
        """The pixel rows of a tile, a view ``[N, y1 - y0, W]`` of ``[N, H, W]``."""
        return image[:, self.rows.starts[tile[0]] : self.rows.starts[tile[1]]]

    def patches(self, b: int, tile: tuple[int, int]) -> Tensor:
        """The cells each group reads, ``[G, V, T]``."""
        window = self.padded[b, :, tile[0] : tile[1] + self.taps - 1]
        cells = window.unfold(1, self.taps, 1).unfold(2, self.taps, 1)  # [V, gy, gx, taps, taps]
        return cells.permute(1, 2, 0, 3, 4).reshape(-1, window.shape[0], self.taps**2)

    def add_patches(self, grad_padded: Tensor, tile: tuple[int, int], grad: Tensor) -> None:
        """Adjoint of :meth:`patches`: add ``[G, V, T]`` to the padded map, in a fixed order."""
        g0, g1 = tile
        nx = self.columns.groups
        grad = grad.reshape(g1 - g0, nx, -1, self.taps, self.taps).permute(2, 0, 1, 3, 4)
        for i in range(self.taps):
            for j in range(self.taps):
                grad_padded[:, g0 + i : g1 + i, j : j + nx] += grad[..., i, j]

    def unpad(self, grad_padded: Tensor) -> Tensor:
        """Adjoint of the replicate padding."""
        return _fold_edge(_fold_edge(grad_padded, 2, self.pad_y), 3, self.pad_x).contiguous()

    def merged_weights(self, b: int, tile: tuple[int, int]) -> Tensor:
        """The tile's weights on whole cells, in the dtype of the values: ``[G, T, S]``."""
        weights = self.rows_of(self.weights[b], tile).to(self.weight_dtype)
        if self.fractional:
            fy, fx = self.rows_of(self.fy[None], tile), self.fx
            grid = weights.unflatten(0, (self.k, self.k))
            down = F.pad(grid * (1 - fy), (0, 0, 0, 0, 0, 0, 0, 1))
            down[1:] += grid * fy
            both = F.pad(down * (1 - fx), (0, 0, 0, 0, 0, 1))
            both[:, 1:] += down * fx
            weights = both.flatten(0, 1)
        return self.to_groups(tile, weights.to(self.dtype))

    def unmerge(self, grad: Tensor, tile: tuple[int, int], out: Tensor) -> None:
        """Adjoint of :meth:`merged_weights`: ``[G, T, S]`` into ``[K*K, y1 - y0, W]``."""
        grad = grad.to(self.weight_dtype)
        if not self.fractional:
            self.from_groups(tile, grad, out)
            return
        merged = grad.new_empty(self.taps**2, *out.shape[1:])
        self.from_groups(tile, grad, merged)
        fy, fx = self.rows_of(self.fy[None], tile), self.fx
        both = merged.unflatten(0, (self.taps, self.taps))
        down = both[:, :-1] * (1 - fx) + both[:, 1:] * fx
        out.copy_((down[:-1] * (1 - fy) + down[1:] * fy).flatten(0, 1))

    def to_groups(self, tile: tuple[int, int], pixels: Tensor) -> Tensor:
        """``[N, y1 - y0, W]`` -> ``[G, N, S]``; slots without a pixel are zero."""
        g0, g1 = tile
        n, (my, mx), nx = (
            pixels.shape[0],
            (self.rows.slots, self.columns.slots),
            self.columns.groups,
        )
        full = pixels.shape[1:] == ((g1 - g0) * my, nx * mx)
        groups = (pixels.new_empty if full else pixels.new_zeros)(g1 - g0, nx, n, my, mx)
        grid = groups.permute(2, 0, 3, 1, 4)  # [N, gy, my, gx, mx]
        blocks = self._blocks(tile)
        if blocks is None:
            rows, columns = self._slot_indices(tile)
            flat = pixels.new_zeros(n, (g1 - g0) * my, nx * mx)
            flat[:, rows[:, None], columns] = pixels
            grid.copy_(flat.reshape(grid.shape))
        else:
            for block, (y, x), shape in blocks:
                grid[block] = pixels[:, y, x].unflatten(2, shape[2:]).unflatten(1, shape[:2])
        return groups.reshape(-1, n, my * mx)

    def from_groups(self, tile: tuple[int, int], groups: Tensor, out: Tensor) -> None:
        """``[G, N, S]`` -> ``out`` ``[N, y1 - y0, W]``, the inverse of :meth:`to_groups`."""
        shape = (tile[1] - tile[0], self.columns.groups, -1, self.rows.slots, self.columns.slots)
        grid = groups.reshape(shape).permute(2, 0, 3, 1, 4)  # [N, gy, my, gx, mx]
        blocks = self._blocks(tile)
        if blocks is None:
            rows, columns = self._slot_indices(tile)
            flat = grid.flatten(3, 4).flatten(1, 2)
            out.copy_(flat.index_select(1, rows).index_select(2, columns))
            return
        for block, (y, x), shape in blocks:
            out[:, y, x].unflatten(2, shape[2:]).unflatten(1, shape[:2]).copy_(grid[block])

    def _slot_indices(self, tile: tuple[int, int]) -> tuple[Tensor, Tensor]:
        rows = self.rows.slots_of_pixels(*tile).to(self.device)
        return rows, self.columns.slots_of_pixels(0, self.columns.groups).to(self.device)

    def _blocks(self, tile: tuple[int, int]) -> list[_Block] | None:
        """The tile as rectangles of equally large groups, or ``None`` where there are too many.

        Integer ratios have nine at most (full groups inside, cut ones at the picture's edges), so
        that moving between the layouts is a few strided copies.
        """
        down = self.rows.runs(*tile)
        across = self.columns.runs(0, self.columns.groups)
        if len(down) * len(across) > _MAX_BLOCKS:
            return None
        origin = self.rows.starts[tile[0]]
        blocks = []
        for y0, y1, ny in down:
            for x0, x1, nx in across:
                block = (
                    slice(None),
                    slice(y0 - tile[0], y1 - tile[0]),
                    slice(ny),
                    slice(x0, x1),
                    slice(nx),
                )
                y = slice(self.rows.starts[y0] - origin, self.rows.starts[y1] - origin)
                x = slice(self.columns.starts[x0], self.columns.starts[x1])
                blocks.append((block, (y, x), (y1 - y0, ny, x1 - x0, nx)))
        return blocks


_Block = tuple[tuple[slice, ...], tuple[slice, slice], tuple[int, int, int, int]]


def _replicate_pad(value: Tensor, pad_y: tuple[int, int], pad_x: tuple[int, int]) -> Tensor:
    """Repeat the edge cells; by indices, which serves every dtype and maps smaller than the pad."""
    h, w = value.shape[2:]
    y = torch.arange(-pad_y[0], h + pad_y[1], device=value.device).clamp(0, h - 1)
    x = torch.arange(-pad_x[0], w + pad_x[1], device=value.device).clamp(0, w - 1)
    return value.index_select(2, y).index_select(3, x)


def _fold_edge(grad: Tensor, dim: int, pad: tuple[int, int]) -> Tensor:
    """Adjoint of replicate padding along ``dim``: the padding's gradients go to the edge cells."""
    size = grad.shape[dim] - pad[0] - pad[1]
    inner = grad.narrow(dim, pad[0], size).clone()
    if pad[0]:
        inner.select(dim, 0).add_(grad.narrow(dim, 0, pad[0]).sum(dim))
    if pad[1]:
        inner.select(dim, size - 1).add_(grad.narrow(dim, pad[0] + size, pad[1]).sum(dim))
    return inner
