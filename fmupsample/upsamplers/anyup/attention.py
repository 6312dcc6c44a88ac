"""Attention of pixels to the cells in a window around them, averaged over heads."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from fmupsample.layers.chunks import recorded
from fmupsample.ops.grid import base_cells, constants
from fmupsample.upsamplers.encoders.runs import Runs, tables

# Bytes of the scores made at once on a processor, and on an accelerator.
_SCORE_BYTES = {"cpu": 8 << 20}
_SCORE_BYTES_ACCELERATOR = 256 << 20


def reach_of(cells: tuple[int, int], ratio: float) -> int:
    """How many cells from its own a pixel may attend to, along either axis."""
    return max(min(ceil(ratio * n), n - 1) for n in cells)


@constants
def runs(cells: int, pixels: int) -> tuple:
    """What :class:`Runs` are made of: the pixels of each cell of an axis."""
    base = base_cells(cells, pixels, False)
    return tables(base[:, None], base)


@constants
def window_logits(cells: int, pixels: int, ratio: float, reach: int) -> Tensor:
    """Along one axis: 0 where a cell is in a pixel's window, else -inf: ``[pixels, 2 reach + 1]``.

    The window reaches ``ratio`` of the axis to either side, cut to the map; a cell counts that it
    touches. In float32 like the official masks, so that ties at a cell's border fall as they do.
    """
    centre = (torch.arange(pixels, dtype=torch.float32) + 0.5) / pixels
    first = ((centre - ratio).clamp(0, 1) * cells).floor().long()
    last = ((centre + ratio).clamp(0, 1) * cells).ceil().long()
    cell = base_cells(cells, pixels, False)[:, None] + torch.arange(-reach, reach + 1)
    inside = (cell >= first[:, None]) & (cell < last[:, None])
    return torch.zeros(cell.shape).masked_fill_(~inside, float("-inf"))


class WindowAttention:
    """Weights of the cells for the pixels of one map.

    Args:
        keys: ``[heads, D, h, w]``, scaled.
        size: ``(H, W)`` of the whole map.
        ratio: how far windows reach, as a share of the map.
    """

    def __init__(self, keys: Tensor, size: tuple[int, int], ratio: float) -> None:
        self.heads, self.cells, self.size = len(keys), tuple(keys.shape[-2:]), size
        reach = reach_of(self.cells, ratio)
        self.side = 2 * reach + 1
        self._keys = F.pad(keys, (reach,) * 4)  # [heads, D, h + 2 reach, w + 2 reach]
        self._rows, columns = (Runs(*runs(n, m)) for n, m in zip(self.cells, size, strict=True))
        down, across = (
            window_logits(n, m, ratio, reach).to(keys)
            for n, m in zip(self.cells, size, strict=True)
        )
        self._slots, self._filled = (t.to(keys.device) for t in (columns.slots, columns.filled))
        self._idle = columns.idle
        self._down = down  # [H, K]
        across = across[self._slots].view(self.cells[1], -1, self.side)
        self._across = across.transpose(1, 2)  # [w, K, s]

    def parts(self, rows: slice) -> Iterator[slice]:
        """The rows in parts that lie in one row of cells, and are worth one product."""
        budget = _SCORE_BYTES.get(self._keys.device.type, _SCORE_BYTES_ACCELERATOR)
        row = len(self._slots) * self.heads * self.side**2 * self._keys.element_size()
        return self._rows.parts(rows, max(1, budget // row))

    def weights(self, query: Tensor, rows: slice) -> Tensor:
        """``[K*K, rows, W]``, of one of the :meth:`parts`.

        Args:
            query: ``[heads, D, rows, W]``, of these rows.
        """
        w, k = self.cells[1], self.side
        cell, count = self._rows.run_of(rows.start), rows.stop - rows.start
        near = self._keys[:, :, cell : cell + k].unfold(3, k, 1)  # [heads, D, K, w, K]
        near = near.permute(3, 0, 2, 4, 1).reshape(w * self.heads, k * k, -1)
        if self._idle:
            query = query.index_select(3, self._slots)
        pixels = query.unflatten(3, (w, -1)).permute(3, 0, 1, 2, 4)  # [w, heads, D, rows, s]
        pixels = pixels.reshape(w * self.heads, pixels.shape[2], -1)
        down = self._down[rows].T[None, :, None, :, None]  # [1, K, 1, rows, 1]
        logits = down + self._across[:, None, :, None, :]  # [w, K, K, rows, s]
        scores = torch.bmm(near, pixels).unflatten(0, (w, self.heads))
        logits = logits.reshape(w, 1, k * k, -1)
        scores = scores + logits if recorded(scores) else scores.add_(logits)
        found = scores.softmax(2).mean(1) if recorded(scores) else _mean_softmax_(scores)
        found = found.view(w, k * k, count, -1).permute(1, 2, 0, 3).flatten(2)  # [K*K, rows, w s]
        return found.index_select(2, self._filled) if self._idle else found


def _mean_softmax_(scores: Tensor) -> Tensor:
    """Softmax over dimension 2, averaged over dimension 1; overwrites the scores."""
    scores.sub_(scores.amax(2, keepdim=True)).exp_()
    scores.mul_((scores.sum(2, keepdim=True) * scores.shape[1]).reciprocal_())
    return scores.sum(1)
