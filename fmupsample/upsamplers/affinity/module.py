"""Affinity: an upsampler that learned from masks which cells belong to a pixel's object.

It re-assembles whole cells and looks at nothing but the image: a pixel's query is compared with
keys made of the mean and the spread of an embedding over each cell, so that a cell which an edge
runs through can be told from a pure one. Superpixel networks predict such associations of pixels
and nine cells too (Yang et al. 2020); here they are learned from masks (:mod:`fmupsample.training`)
and serve the features of any backbone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import isqrt, prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.layers.norms import convolved
from fmupsample.layers.parts import InParts, in_parts
from fmupsample.ops.grid import base_cell, cell_shares
from fmupsample.ops.memory import on_huge_pages
from fmupsample.upsamplers.affinity.config import AffinityConfig
from fmupsample.upsamplers.affinity.encoder import ALIGNMENT, REACH, Encoder
from fmupsample.upsamplers.affinity.scores import EXTRAS, affinity_weights
from fmupsample.upsamplers.cells import Window
from fmupsample.upsamplers.complexity import Size, per_place
from fmupsample.upsamplers.neighbours import resized
from fmupsample.upsamplers.universal import UniversalUpsampler

_SMALLEST_SPREAD = 1e-4  # added to variances: keeps the slope of the root finite
_KEY_REACH = 1  # cells around a cell that its key depends on
# Own rows and columns of a window, at least: smaller ones would be mostly overlap.
_FEWEST = 256


class CellKeys(nn.Module):
    """Mean and spread of the embedding over cells, ``[B, 2 E, h, w]`` -> ``[B, E + 1, h, w]``.

    A linear part, and a network that sees the cells around. The map comes padded by
    one cell on each side, and goes without.
    """

    def __init__(self, embedding: int, width: int) -> None:
        super().__init__()
        self.direct = nn.Conv2d(2 * embedding, embedding + 1, 1)
        self.around = nn.Conv2d(2 * embedding, width, 3)
        self.hidden = nn.Conv2d(width, embedding + 1, 1)

    def forward(self, statistics: Tensor) -> Tensor:
        around = F.gelu(convolved(statistics, self.around))
        inner = statistics[..., 1:-1, 1:-1]
        return convolved(inner, self.direct) + convolved(around, self.hidden)


class Affinity(UniversalUpsampler):
    """Upsample features of any backbone under the guidance of the normalised image.

    ``[B, C, h, w]`` and ``[B, 3, H, W]`` -> ``[B, C, H, W]`` at any ratio >= 1. Kernel weights are
    computed in float32 (float64 for float64 features) and do not depend on the features.
    """

    name: ClassVar[str] = "affinity"
    bytes_per_pixel: ClassVar[int] = 900

    def __init__(self, config: AffinityConfig) -> None:
        super().__init__()
        self.config = config
        self.kernel_size = config.kernel_size
        self.encoder = Encoder(config.embedding + EXTRAS, config.width, config.detail)
        self.keys = CellKeys(config.embedding, config.key_width)
        # Training starts at the place and colour prior with keys that do not matter yet.
        for layer in (self.keys.direct, self.keys.hidden):
            nn.init.normal_(layer.weight, std=1e-2)
            nn.init.zeros_(layer.bias)
        for layer in (self.encoder.from_coarse, self.encoder.from_fine):
            with torch.no_grad():
                layer.weight[config.embedding :] *= 0.1

    def macs(self, channels: int, cells: Size, pixels: Size) -> tuple[int, int]:
        """The encoder, keys of cells, K^2 (E + 4) HR of similarities, K^2 C HR of reassembly."""
        c, hr = self.config, prod(pixels)
        convolution = self.encoder.macs(hr) + per_place(self.keys) * prod(cells)
        return convolution, c.kernel_size**2 * (c.embedding + 4 + channels) * hr

    def kernels(
        self, x: Tensor, guidance: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Kernel weights ``[B, K*K, H, W]``; zero where a cell lies outside the picture."""
        size = self.check(x, guidance, size)
        with torch.autocast(x.device.type, enabled=False):
            image = self._prepared(x, guidance, size)
            return self._weights(image, x.shape[-2:], (slice(0, size[0]), slice(0, size[1])))

    def kernels_in_rows(
        self, x: Tensor, guidance: Tensor | InParts | None, size: tuple[int, int], pixels: int
    ) -> Iterator[Tensor]:
        few = len(x) * size[0] * size[1] <= pixels
        if guidance is None or few:
            yield from super().kernels_in_rows(x, guidance, size, pixels)
            return
        guidance = in_parts(guidance)
        size = self.check(x, guidance.like, size)
        with torch.no_grad():
            image = self._prepared(x, guidance, size)
        for rows, windows in self._windows(x.shape[-2:], size, pixels // len(x)):
            band = None
            for columns in windows:
                with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                    weights = self._weights(image, x.shape[-2:], (rows, columns))
                if band is None:
                    band = on_huge_pages(weights.new_empty(*weights.shape[:3], size[1]))
                band[..., columns] = weights
            yield band

    def _prepared(self, x: Tensor, guidance: Tensor | InParts, size: tuple[int, int]) -> InParts:
        """The image at the size of the output, normalised as the head wants it."""
        if guidance.shape[-2:] != size:
            guidance = resized(guidance[...].to(torch.promote_types(x.dtype, torch.float32)), size)
        return self._renormalised(x, guidance)

    def _windows(
        self, cells: tuple[int, int], size: tuple[int, int], pixels: int
    ) -> Iterator[tuple[slice, list[slice]]]:
        """Rows, and columns of the windows in them, that read about so many pixels each."""
        ratio = max(-(-n // m) for n, m in zip(size, cells, strict=True))
        margin = REACH + ALIGNMENT + (self.kernel_size // 2 + _KEY_REACH + 1) * ratio
        across = min(size[1], max(_FEWEST, isqrt(2 * pixels) - 2 * margin))
        down = min(size[0], max(_FEWEST, pixels // (across + 2 * margin) - 2 * margin))
        for rows in _cuts(size[0], down):
            yield rows, _cuts(size[1], across)

    def _weights(self, image: InParts, cells: tuple[int, int], own: Window) -> Tensor:
        """Kernel weights ``[B, K*K, rows, columns]`` of the window ``own`` of ``image``."""
        size = tuple(image.shape[-2:])
        axes = [
            _Axis(n, pixels, part, self.kernel_size // 2)
            for n, pixels, part in zip(cells, size, own, strict=True)
        ]
        part = image[(..., *(axis.region for axis in axes))]
        embedding = self._encoded(part)
        described, _ = embedding.split([self.config.embedding, EXTRAS], 1)
        mean, square, colours = (
            _means(x, axes) for x in (described, described.square(), part)
        )  # of the cells that keys depend on
        spread = (square - mean.square()).clamp_min(0).add(_SMALLEST_SPREAD).sqrt()
        padding = [n for axis in axes[::-1] for n in axis.missing]
        found = self.keys(F.pad(torch.cat([mean, spread], 1), padding, mode="replicate"))
        keys = part.new_zeros(part.shape[0], found.shape[1], *cells)
        means = part.new_zeros(part.shape[0], 3, *cells)
        rows, columns = (axis.cells for axis in axes)
        inner = tuple(axis.inner for axis in axes)
        keys[..., rows, columns] = found
        means[..., rows, columns] = colours[(..., *inner)]
        if [(axis.own.start, axis.own.stop) for axis in axes] != [(0, n) for n in part.shape[-2:]]:
            inside = (..., *(axis.own for axis in axes))
            embedding, part = embedding[inside], part[inside]
        return affinity_weights(self.config, embedding, part, keys, means, size, own)

    def _encoded(self, image: Tensor) -> Tensor:
        """The embedding of a region that begins at a multiple of the encoder's alignment."""
        height, width = image.shape[-2:]
        pad = (0, -width % ALIGNMENT, 0, -height % ALIGNMENT)
        padded = F.pad(image, pad, mode="replicate") if any(pad) else image
        embedding = self.encoder(padded)
        return embedding[..., :height, :width] if any(pad) else embedding


class _Axis:
    """What a window needs along one axis.

    Attributes:
        cells: whose keys its pixels are compared with.
        inner: the same, among the cells whose statistics are taken.
        missing: cells to repeat before and after those, at the borders of the map.
        region: pixels that all this depends on; own: the window's own among them.
        shares: float64 ``[cells, pixels of the region]``: what makes the means over cells.
    """

    def __init__(self, cells: int, pixels: int, own: slice, reach: int) -> None:
        first = max(0, base_cell(own.start, cells, pixels, False) - reach)
        last = min(cells, base_cell(own.stop - 1, cells, pixels, False) + reach + 1)
        self.cells = slice(first, last)
        known = slice(max(0, first - _KEY_REACH), min(cells, last + _KEY_REACH))
        self.inner = slice(first - known.start, last - known.start)
        self.missing = (
            _KEY_REACH - (first - known.start),
            _KEY_REACH - (known.stop - last),
        )
        start = known.start * pixels // cells - REACH
        stop = -(-known.stop * pixels // cells) + REACH
        stop += -stop % ALIGNMENT
        self.region = slice(max(0, start - start % ALIGNMENT), min(pixels, stop))
        self.own = slice(own.start - self.region.start, own.stop - self.region.start)
        self.shares = cell_shares(cells, pixels, known, self.region)


def _means(x: Tensor, axes: Sequence[_Axis]) -> Tensor:
    """Means of ``[B, C, rows, columns]`` over the cells of a window."""
    down, across = (axis.shares.to(x) for axis in axes)
    return down @ (x @ across.T)


def _cuts(length: int, most: int) -> list[slice]:
    count = -(-length // most)
    bounds = [length * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(bounds)]
