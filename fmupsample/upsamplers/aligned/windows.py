"""Kernel weights of a large map, window by window, equal to those of the whole.

All of it is local to a few dozen pixels but for the GroupNorms, whose moments span the picture. So
there are passes over the windows: some that only collect moments, each with what the one before it
found (of the guidance, of queries and keys, ...), and one that makes the weights. Windows overlap
by what filters and neighbours reach; moments are taken over the pixels that are a window's own, and
pooled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from fmupsample.layers.filters import fast_guided_filter, half_grid, upsampled_on_half_grid
from fmupsample.layers.moments import group_moments, pooled_moments
from fmupsample.layers.parts import InParts
from fmupsample.ops.grid import plan_axis
from fmupsample.ops.memory import on_huge_pages
from fmupsample.upsamplers.aligned.module import AlignedUpsampler

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


class WindowedKernels(ABC):
    """The passes over one picture; a subclass says what they collect and how scores are made.

    Args:
        x: features ``[B, C, h, w]``.
        guidance: ``[B, G, H, W]`` at the size of the output, before the stem.
        pixels: of a window's region, about.
        neighbours: pixels around a pixel of the guidance after the stem that its scores depend on.
    """

    def __init__(
        self,
        head: AlignedUpsampler,
        x: Tensor,
        guidance: InParts,
        size: tuple[int, int],
        pixels: int,
        *,
        neighbours: int,
    ) -> None:
        c = head.config
        self.head, self.guidance, self.size = head, guidance, size
        self.device, self.cells = x.device.type, (x.shape[2], x.shape[3])
        self.moments: dict[str, Moments] = {}
        # Two box means on the half grid, and a bilinear sample of their result.
        filtered = 2 * (2 * (c.guided_radius // 2) + 1) + 2 if c.align and c.semantic else 0
        self.windows = split(size, pixels, _STEM_REACH + max(filtered, neighbours))
        with torch.no_grad():
            self.prior = head.prior(guidance, self.cells)
            self.key = head.low_key(x) if c.semantic else None

    @abstractmethod
    def moments_of_queries(self, window: Window) -> dict[str, Moments]:
        """Of the window's own queries and keys, by names for :attr:`moments`."""

    def later_moments(self, window: Window) -> dict[str, Moments]:
        """Of what is made with those; by default there is none."""
        return {}

    @abstractmethod
    def scores(self, window: Window) -> Iterator[Tensor]:
        """Scores ``[B, K*K, rows, columns]`` of each pair, for the window's own pixels."""

    def bands(self) -> Iterator[Tensor]:
        """Kernel weights ``[B, K*K, rows, W]`` from the top."""
        self._measure()
        for windows in self.windows:
            yield self._band(windows)

    @torch.no_grad()
    def _measure(self) -> None:
        """The moments of every norm over the whole picture."""
        with torch.autocast(self.device, enabled=False):
            for measure in (self._moments_of_guidance, self.moments_of_queries, self.later_moments):
                self._pool(measure)

    @torch.no_grad()
    def _band(self, windows: list[Window]) -> Tensor:
        out: Tensor | None = None
        for window in windows:
            with torch.autocast(self.device, enabled=False):
                scores = None
                for more in self.scores(window):
                    scores = more if scores is None else scores.add_(more)
                weights = self.prior.add(scores, window.own).softmax(1)
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

    def _moments_of_guidance(self, window: Window) -> dict[str, Moments]:
        own = window.cut(self._guidance(window))
        return {"guidance": group_moments(own, self.head.guidance_norm.num_groups)}

    def _guidance(self, window: Window) -> Tensor:
        return self.head.through_stem(self.guidance[(..., *window.region)])

    def query(self, window: Window) -> Tensor:
        """Queries of the window's region."""
        return self.head.queries(self._guidance(window), self.moments["guidance"])

    def aligned(self, window: Window, query: Tensor) -> Tensor:
        """The region's queries, filtered towards the keys of the features."""
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
