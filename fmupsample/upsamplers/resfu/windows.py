"""ReSFU's kernel weights, window by window."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from fmupsample.layers.filters import gaussian3
from fmupsample.layers.moments import group_moments, upsampled_group_moments
from fmupsample.layers.parts import InParts
from fmupsample.upsamplers.aligned.module import AlignedUpsampler
from fmupsample.upsamplers.aligned.windows import Moments, Window, WindowedKernels
from fmupsample.upsamplers.aligned.workspace import Workspace
from fmupsample.upsamplers.resfu.keys import Keys, neighbour_stride


class WindowedDifferences(WindowedKernels):
    """The passes over one picture, one more than usual: the middle channels have a norm too."""

    def __init__(
        self,
        head: AlignedUpsampler,
        x: Tensor,
        guidance: InParts,
        size: tuple[int, int],
        pixels: int,
        workspace: Workspace,
    ) -> None:
        c, self.workspace = head.config, workspace
        self.stride = neighbour_stride(size, (x.shape[2], x.shape[3]))
        self.reach = tuple(s * (c.kernel_size // 2) for s in self.stride)
        neighbours = max(self.reach) + 1 if c.detail else 0
        super().__init__(head, x, guidance, size, pixels, neighbours=neighbours)
        if c.semantic:
            moments = upsampled_group_moments(self.key, size, c.norm_groups)
            self.keys = head.semantic_scores.upsampled_keys(self.key, moments, size)

    def moments_of_queries(self, window: Window) -> dict[str, Moments]:
        c, query, found = self.head.config, self.query(window), {}
        if c.semantic:
            own = window.cut(self.aligned(window, query))
            found["semantic"] = group_moments(own, c.norm_groups)
        if c.detail:
            found["detail"] = group_moments(window.cut(query), c.norm_groups)
            key = window.cut(self._detail_key(query))
            found["detail key"] = group_moments(key, c.norm_groups)
        return found

    def later_moments(self, window: Window) -> dict[str, Moments]:
        return {
            f"{pair} middle": self._partial(pair, keys, query)[1]
            for pair, keys, query in self._pairs(window)
        }

    def scores(self, window: Window) -> Iterator[Tensor]:
        for pair, keys, query in self._pairs(window):
            parts, _ = self._partial(pair, keys, query)
            module = getattr(self.head, f"{pair}_scores")
            yield module.complete(parts, self.moments[f"{pair} middle"])

    def _pairs(self, window: Window) -> Iterator[tuple[str, Keys, Tensor]]:
        """Of each pair: its name, keys and own queries."""
        c, query = self.head.config, self.query(window)
        if c.semantic:
            own = window.cut(self.aligned(window, query))
            yield "semantic", replace(self.keys, window=window.own), own
        if c.detail:
            # The key is padded by its border's own values, not by what filters make of a border.
            key = window.cut(self._detail_key(query), self.reach)
            keys = self.head.detail_scores.full_keys(key, self.moments["detail key"], self.stride)
            yield "detail", replace(keys, windowed=True), window.cut(query)

    def _partial(self, pair: str, keys: Keys, query: Tensor) -> tuple[list[Tensor], Moments]:
        module = getattr(self.head, f"{pair}_scores")
        return module.partial(keys, query.contiguous(), self.moments[pair], self.workspace)

    def _detail_key(self, query: Tensor) -> Tensor:
        return gaussian3(query) if self.head.config.align else query
