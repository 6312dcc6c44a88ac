"""ReSFU's kernel weights of a large map, window by window, equal to those of the whole.

All of ReSFU is local to a few dozen pixels but for its GroupNorms, whose moments span the picture.
So there are passes over the windows: three that only collect moments, each with what the one before
it found (of the guidance; of queries and keys; of the middle channels, where there are any), and
one that makes the weights. Windows overlap by what filters and neighbours reach; moments are taken
over the pixels that are a window's own, and pooled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from math import isqrt
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fmupsample.layers.filters import (
    fast_guided_filter,
    gaussian3,
    half_grid,
    upsampled_on_half_grid,
)
from fmupsample.layers.moments import (
    group_moments,
    pointwise_after_norm,
    pooled_moments,
    upsampled_group_moments,
)
from fmupsample.layers.parts import InParts
from fmupsample.ops.grid import cell_shares, plan_axis
from fmupsample.ops.memory import on_huge_pages
from fmupsample.upsamplers.resfu.prior import Prior
from fmupsample.upsamplers.resfu.scores import Workspace

if TYPE_CHECKING:
    from fmupsample.upsamplers.resfu.keys import Keys
    from fmupsample.upsamplers.resfu.module import ReSFU

Moments = tuple[Tensor, Tensor]
# Own rows and columns of a window, at least: smaller ones would be mostly overlap.
_FEWEST = 192
_STEM_REACH = 2


@dataclass(frozen=True)
class Window:
    """Some pixels of the output and the pixels around them that they depend on.

    Attributes:
        own: rows and columns; the windows' own pixels are all of the map, each once.
        region: rows and columns, larger on every side that is not the picture's border. Begins at
            even pixels, where the half grid of the guided filter does.
    """

    own: tuple[slice, slice]
    region: tuple[slice, slice]

    @property
    def pixels(self) -> int:
        rows, columns = self.own
        return (rows.stop - rows.start) * (columns.stop - columns.start)

    def cut(self, x: Tensor, more: tuple[int, int] = (0, 0)) -> Tensor:
        """Its own pixels of a map of the region, and ``more`` around, repeated at the border."""
        parts, missing = [], []
        for own, region, wanted, have in zip(
            self.own, self.region, more, x.shape[-2:], strict=True
        ):
            first, last = own.start - region.start - wanted, own.stop - region.start + wanted
            missing.append((max(0, -first), max(0, last - have)))
            parts.append(slice(max(0, first), min(last, have)))
        part = x[..., parts[0], parts[1]]
        pad = (*missing[1], *missing[0])
        return F.pad(part, pad, mode="replicate") if any(pad) else part


def split(size: tuple[int, int], pixels: int, reach: int) -> list[list[Window]]:
    """Windows with regions of at most about ``pixels``, a list for each band of rows.

    Args:
        reach: pixels around a pixel that it depends on.
    """
    height, width = size
    # Twice as wide as high, for the strips inside are rows of a window; and lower where the picture
    # is wide, for bands are kept whole: of two windows' pixels at most.
    rows = min(isqrt(pixels // 2) - 2 * reach, 2 * pixels // width)
    rows = min(height, max(rows, _FEWEST))
    columns = min(width, max(pixels // (rows + 2 * reach) - 2 * reach, _FEWEST))
    bands, across = -(-height // rows), -(-width // columns)

    def cuts(length: int, count: int) -> list[tuple[slice, slice]]:
        bounds = [length * i // count for i in range(count + 1)]
        found = []
        for a, b in pairwise(bounds):
            first, last = max(0, a - reach), min(length, b + reach)
            last = last if last == length else last + last % 2
            found.append((slice(a, b), slice(first - first % 2, min(last, length))))
        return found

    return [
        [Window((y, x), (around_y, around_x)) for x, around_x in cuts(width, across)]
        for y, around_y in cuts(height, bands)
    ]


def neighbour_stride(size: tuple[int, int], cells: tuple[int, int]) -> tuple[int, int]:
    """Pixels from one neighbour to the next: at ratios that are not whole, the nearest step."""
    return tuple(max(1, round(n / m)) for n, m in zip(size, cells, strict=True))


def _cell_shares(cells: int, pixels: int, part: slice) -> tuple[slice, Tensor]:
    """What some pixels of an axis contribute to what ``adaptive_avg_pool2d`` makes of all.

    Returns:
        The cells that they contribute to, and a float64 matrix ``[these cells, these pixels]``.
    """
    first, last = part.start * cells // pixels, -(-part.stop * cells // pixels)
    return slice(first, last), cell_shares(cells, pixels, slice(first, last), part)


def resized_guidance(guidance: Tensor, size: tuple[int, int]) -> Tensor:
    """The guidance at the size of the output."""
    if guidance.shape[-2:] == size:
        return guidance
    return F.interpolate(guidance, size=size, mode="bilinear", align_corners=False, antialias=True)


class WindowedKernels:
    """The passes over one picture: ``measure()``, then ``band(windows)`` for each of ``windows``.

    Args:
        x: features ``[B, C, h, w]``.
        guidance: ``[B, G, H, W]`` at the size of the output, before the stem.
        pixels: of a window's region, about.
        low: multiply in bfloat16 where ReSFU does for bfloat16 features.
    """

    def __init__(
        self,
        head: ReSFU,
        x: Tensor,
        guidance: InParts,
        size: tuple[int, int],
        pixels: int,
        low: bool,
    ) -> None:
        c = head.config
        self.head, self.guidance, self.size, self.low = head, guidance, size, low
        self.device, cells = x.device.type, (x.shape[2], x.shape[3])
        self.prior = Prior(c, guidance, cells)
        self.stride = neighbour_stride(size, cells)
        self.reach = tuple(s * (c.kernel_size // 2) for s in self.stride)
        # Two box means on the half grid, and a bilinear sample of their result.
        filtered = 2 * (2 * (c.guided_radius // 2) + 1) + 2 if c.align and c.semantic else 0
        self.by_distance = c.similarity == "distance"
        neighbours = max(self.reach) + 1 if c.detail and not self.by_distance else 0
        self.windows = split(size, pixels, _STEM_REACH + max(filtered, neighbours))
        self.workspace = Workspace()
        self.moments: dict[str, Moments] = {}
        self.key: Tensor | None = None
        # For distances, of the detail pair: the means of the queries over the cells.
        self.cell_means = x.new_zeros(len(x), c.embedding, *cells) if self.by_distance else None
        if c.semantic:
            self.key = head.low_key(x)
        if c.semantic and not self.by_distance:
            self.keys = head.semantic_scores.upsampled_keys(
                self.key, upsampled_group_moments(self.key, size, c.norm_groups), size
            )

    @torch.no_grad()
    def measure(self) -> None:
        """The moments of every norm over the whole picture."""
        c, head = self.head.config, self.head

        def of_guidance(window: Window) -> dict[str, Moments]:
            own = window.cut(self._guidance(window))
            return {"guidance": group_moments(own, head.guidance_norm.num_groups)}

        def of_queries(window: Window) -> dict[str, Moments]:
            query, found = self._query(window), {}
            if c.semantic:
                own = window.cut(self._aligned(window, query))
                found["semantic"] = group_moments(own, c.norm_groups)
            if c.detail:
                own = window.cut(query)
                found["detail"] = group_moments(own, c.norm_groups)
                if self.by_distance:
                    self._add_to_means(window, own)
                    return found
                key = window.cut(self._detail_key(query))
                found["detail key"] = group_moments(key, c.norm_groups)
            return found

        def of_middle(window: Window) -> dict[str, Moments]:
            return {
                f"{pair} middle": self._partial(pair, window, *inputs)[1]
                for pair, inputs in self._pairs(window)
            }

        passes = [of_guidance, of_queries]
        with torch.autocast(self.device, enabled=False):
            for measure in passes if self.by_distance else [*passes, of_middle]:
                self._pool(measure)

    @torch.no_grad()
    def band(self, windows: list[Window]) -> Tensor:
        """Kernel weights ``[B, K*K, rows, W]`` of the windows beside one another."""
        out: Tensor | None = None
        for window in windows:
            with torch.autocast(self.device, enabled=False):
                weights = self._weights(window)
            if out is None:
                out = on_huge_pages(weights.new_empty(*weights.shape[:3], self.size[1]))
            out[..., window.own[1]] = weights
        assert out is not None
        return out

    def _pool(self, measure: Callable[[Window], dict[str, Moments]]) -> None:
        windows = [window for band in self.windows for window in band]
        found = [measure(window) for window in windows]
        counts = [window.pixels for window in windows]
        for name in found[0]:
            self.moments[name] = pooled_moments([f[name] for f in found], counts)

    def _weights(self, window: Window) -> Tensor:
        scores = None
        for more in (self._distances if self.by_distance else self._differences)(window):
            scores = more if scores is None else scores.add_(more)
        return self.prior.add(scores, window.own).softmax(1)

    def _differences(self, window: Window) -> Iterator[Tensor]:
        """Scores of each pair, by paired differences."""
        for pair, inputs in self._pairs(window):
            parts, _ = self._partial(pair, window, *inputs)
            module = getattr(self.head, f"{pair}_scores")
            yield module.complete(parts, self.moments[f"{pair} middle"])

    def _distances(self, window: Window) -> Iterator[Tensor]:
        """The same, by distances."""
        c, head, query = self.head.config, self.head, self._query(window)
        if c.semantic:
            own = window.cut(self._aligned(window, query))
            moments = self.moments["semantic"]
            yield head.semantic_scores(own, self.key, self.size, window.own, moments)
        if c.detail:
            own, moments = window.cut(query), self.moments["detail"]
            yield head.detail_scores(own, self.cell_means, self.size, window.own, moments)

    def _add_to_means(self, window: Window, query: Tensor) -> None:
        (rows, down), (columns, across) = (
            _cell_shares(n, m, own)
            for n, m, own in zip(self.cell_means.shape[2:], self.size, window.own, strict=True)
        )
        self.cell_means[..., rows, columns] += down.to(query) @ query @ across.T.to(query)

    def _pairs(self, window: Window):
        """Of each pair: its name, keys and own queries."""
        c, query = self.head.config, self._query(window)
        if c.semantic:
            own = window.cut(self._aligned(window, query))
            yield "semantic", (replace(self.keys, window=window.own), own)
        if c.detail:
            # The key is padded by its border's own values, not by what filters make of a border.
            key = window.cut(self._detail_key(query), self.reach)
            keys = self.head.detail_scores.full_keys(key, self.moments["detail key"], self.stride)
            yield "detail", (replace(keys, windowed=True), window.cut(query))

    def _partial(
        self, pair: str, window: Window, keys: Keys, query: Tensor
    ) -> tuple[list[Tensor], Moments]:
        module = getattr(self.head, f"{pair}_scores")
        query = query.contiguous()
        return module.partial(
            keys, query, self.moments[pair], self.workspace, low_precision=self.low
        )

    def _guidance(self, window: Window) -> Tensor:
        part = self.guidance[(..., *window.region)]
        return part if self.head.stem is None else self.head.stem(part)

    def _query(self, window: Window) -> Tensor:
        head = self.head
        weight = head.query.weight.flatten(1)
        return pointwise_after_norm(
            self._guidance(window),
            head.guidance_norm,
            weight,
            head.query.bias,
            self.moments["guidance"],
        )

    def _detail_key(self, query: Tensor) -> Tensor:
        return gaussian3(query) if self.head.config.align else query

    def _aligned(self, window: Window, query: Tensor) -> Tensor:
        c = self.head.config
        if not c.align:
            return query
        half = tuple(
            slice(r.start // 2, r.start // 2 + len(range(n)[half_grid(n)]))
            for r, n in zip(window.region, query.shape[-2:], strict=True)
        )
        target = upsampled_on_half_grid(self.key, self.size, half)
        resize = None
        if any(n % 2 for n in self.size):
            # Then the half grid is not exactly half, and a part is not resized like the whole.
            def resize(coefficients: Tensor) -> Tensor:
                for dim in (2, 3):
                    coefficients = _resized(
                        coefficients, dim, self.size[dim - 2], window.region[dim - 2], half[dim - 2]
                    )
                return coefficients

        return fast_guided_filter(query, target, c.guided_radius // 2, c.guided_eps, resize)


def _resized(x: Tensor, dim: int, pixels: int, region: slice, half: slice) -> Tensor:
    """A part of a half-grid map along one axis -> the pixels of its region, as if it were whole."""
    cells = max(1, pixels // 2)
    plan = plan_axis(cells, pixels, True)
    base, share = plan.base[region], plan.fraction[region]
    shape = [1, 1, 1, 1]
    shape[dim] = -1
    share = share.to(x).reshape(shape)
    last = x.shape[dim] - 1
    low, high = (
        x.index_select(
            dim, ((base + i).clamp(0, cells - 1) - half.start).clamp(0, last).to(x.device)
        )
        for i in (0, 1)
    )
    return torch.lerp(low, high, share)
