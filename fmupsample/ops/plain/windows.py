"""How the pixels of an axis, cut into blocks, share the cells they read.

A block of neighbouring pixels reads a *window* of neighbouring cells. Which share of which cell is
in the bilinear sample of each neighbour is a constant of the axis; cells beyond the border count
for the border's, so nothing needs padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from fmupsample.ops.grid import AxisPlan, plan_axis

# Rows that share a window: longer groups of rows are cut, shorter ones joined.
_FEWEST_ROWS, _MOST_ROWS = 8, 32
# Columns of a block, in steps of a cache line: about four groups, for long runs of memory and few
# zeros; one group in channels-last maps, where a pixel's channels are a run of their own.
_LINE = 16
_MOST_COLUMNS = 256


@dataclass(frozen=True, eq=False)
class Windows:
    """Blocks of pixels of one axis and the cells they read.

    Attributes:
        bounds: first pixel of each block, and the number of pixels at the end.
        first: first cell of each block's window.
        cells: cells in a window, the same for all blocks.
        pixels: pixels in the longest block.
        shares: float64 ``[blocks, K, cells, pixels]``: the share of a cell of the window in the
            sample of a pixel's neighbour. Zeros for pixels that a shorter block does not have.
    """

    bounds: tuple[int, ...]
    first: tuple[int, ...]
    cells: int
    pixels: int
    shares: Tensor

    @property
    def count(self) -> int:
        return len(self.first)

    def pixel_slice(self, block: int) -> slice:
        return slice(self.bounds[block], self.bounds[block + 1])

    def cell_slice(self, block: int) -> slice:
        return slice(self.first[block], self.first[block] + self.cells)


@lru_cache(maxsize=256)
def row_windows(cells: int, pixels: int, k: int, fractional: bool) -> Windows:
    """Blocks of rows: whole groups where possible, since their rows read the same cells."""
    axis = plan_axis(cells, pixels, fractional)
    bounds = [0]
    for end in axis.starts[1:]:
        if end - bounds[-1] >= _FEWEST_ROWS or end == pixels:
            pieces = -(-(end - bounds[-1]) // _MOST_ROWS)
            first = bounds[-1]
            bounds += [first + (end - first) * (n + 1) // pieces for n in range(pieces)]
    return _windows(axis, k, fractional, tuple(bounds))


@lru_cache(maxsize=256)
def column_windows(
    cells: int, pixels: int, k: int, fractional: bool, channels_last: bool
) -> Windows:
    """Blocks of columns, equally long but for the last."""
    axis = plan_axis(cells, pixels, fractional)
    wanted = axis.slots if channels_last else max(4 * axis.slots, 2 * _LINE)
    step = min(-(-wanted // _LINE) * _LINE, _MOST_COLUMNS)
    return _windows(axis, k, fractional, (*range(0, pixels, step), pixels))


def _windows(axis: AxisPlan, k: int, fractional: bool, bounds: tuple[int, ...]) -> Windows:
    lengths = [b - a for a, b in pairwise(bounds)]
    block = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    place = torch.arange(axis.pixels) - torch.tensor(bounds)[block]
    last_cell = axis.cells - 1
    # A bilinear sample lies between two cells.
    reach = torch.arange(k) - k // 2
    low = (axis.base[:, None] + reach).clamp(0, last_cell)  # [N, K]
    high = (axis.base[:, None] + reach + int(fractional)).clamp(0, last_cell)
    starts = torch.tensor(bounds)
    first, final = low[starts[:-1], 0], high[starts[1:] - 1, -1]
    cells = int((final - first).max()) + 1
    first = torch.minimum(first, torch.tensor(axis.cells - cells))
    shares = torch.zeros(len(lengths), k, cells, max(lengths), dtype=torch.float64)
    neighbour = torch.arange(k).expand_as(low)
    for cell, share in ((low, 1 - axis.fraction), (high, axis.fraction)):
        index = (block[:, None], neighbour, cell - first[block][:, None], place[:, None])
        shares.index_put_(index, share[:, None].expand_as(low), accumulate=True)
    return Windows(bounds, tuple(first.tolist()), cells, max(lengths), shares)
