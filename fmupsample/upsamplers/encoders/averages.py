"""Averages of maps that come in rows: over the cells of a grid, and at another size."""

from __future__ import annotations

import torch
from torch import Tensor

from fmupsample.ops.grid import cell_shares
from fmupsample.upsamplers.encoders.maps import TiledMap


class CellMeans:
    """Means over cells of a map that comes in tiles of rows, as ``adaptive_avg_pool2d`` does."""

    def __init__(self, cells: tuple[int, int], size: tuple[int, int]) -> None:
        self.cells, self.size = cells, size
        self._across = cell_shares(cells[1], size[1], slice(0, cells[1]), slice(0, size[1]))
        self._total: Tensor | None = None

    def add(self, tile: Tensor, rows: slice) -> None:
        (h, _), (height, width) = self.cells, self.size
        if self._total is None:
            self._total = tile.new_zeros(len(tile), *self.cells)
        # A row of cells may share its last row of pixels with the next.
        cells = slice(rows.start * h // height, min(h, -(-rows.stop * h // height)))
        down = cell_shares(h, height, cells, rows).to(tile)
        sums = torch.matmul(down, tile.unflatten(1, (-1, width)))  # [C, cells, W]
        self._total[:, cells] += torch.matmul(sums, self._across.T.to(tile))

    def whole(self) -> Tensor:
        assert self._total is not None
        return self._total


def at_size(source: TiledMap, rows: slice, size: tuple[int, int]) -> Tensor:
    """Rows ``[E, rows, W]`` of the map at another size, as ``adaptive_avg_pool2d`` makes it."""
    own = source.size
    if size == own:
        return source.read(rows).unflatten(1, (-1, own[1]))
    region = slice(rows.start * own[0] // size[0], -(-rows.stop * own[0] // size[0]))
    part = source.read(region).unflatten(1, (-1, own[1]))
    down = cell_shares(size[0], own[0], rows, region).to(part)
    across = cell_shares(size[1], own[1], slice(0, size[1]), slice(0, own[1])).to(part)
    return down @ part @ across.T
