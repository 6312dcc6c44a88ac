"""Kernel weights of bilateral cells, window by window."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fmupsample.layers.moments import group_moments
from fmupsample.layers.parts import InParts
from fmupsample.ops.grid import cell_shares
from fmupsample.upsamplers.aligned.module import AlignedUpsampler
from fmupsample.upsamplers.aligned.windows import Moments, Window, WindowedKernels


class WindowedDistances(WindowedKernels):
    """The passes over one picture; the keys of the detail pair are collected on the way."""

    def __init__(
        self,
        head: AlignedUpsampler,
        x: Tensor,
        guidance: InParts,
        size: tuple[int, int],
        pixels: int,
    ) -> None:
        super().__init__(head, x, guidance, size, pixels, neighbours=0)
        # Of the queries of the detail pair, over the cells.
        self.cell_means = x.new_zeros(len(x), head.config.embedding, *self.cells)

    def moments_of_queries(self, window: Window) -> dict[str, Moments]:
        c, query, found = self.head.config, self.query(window), {}
        if c.semantic:
            own = window.cut(self.aligned(window, query))
            found["semantic"] = group_moments(own, c.norm_groups)
        if c.detail:
            own = window.cut(query)
            found["detail"] = group_moments(own, c.norm_groups)
            self._add_to_means(window, own)
        return found

    def scores(self, window: Window) -> Iterator[Tensor]:
        c, head, query = self.head.config, self.head, self.query(window)
        if c.semantic:
            own = window.cut(self.aligned(window, query))
            moments = self.moments["semantic"]
            yield head.semantic_scores(own, self.key, self.size, window.own, moments)
        if c.detail:
            own, moments = window.cut(query), self.moments["detail"]
            yield head.detail_scores(own, self.cell_means, self.size, window.own, moments)

    def _add_to_means(self, window: Window, query: Tensor) -> None:
        (rows, down), (columns, across) = (
            _cell_shares(n, m, own)
            for n, m, own in zip(self.cells, self.size, window.own, strict=True)
        )
        self.cell_means[..., rows, columns] += down.to(query) @ query @ across.T.to(query)


def _cell_shares(cells: int, pixels: int, part: slice) -> tuple[slice, Tensor]:
    """What some pixels of an axis contribute to what ``adaptive_avg_pool2d`` makes of all.

    Returns:
        The cells that they contribute to, and a float64 matrix ``[these cells, these pixels]``.
    """
    first, last = part.start * cells // pixels, -(-part.stop * cells // pixels)
    return slice(first, last), cell_shares(cells, pixels, slice(first, last), part)
