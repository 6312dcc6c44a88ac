"""AnyUp, Wimmer et al., "AnyUp: Universal Feature Upsampling" (2025).

A pixel's query comes from the image; a cell's key from the image's features averaged over the cell,
and from the features to upsample, described by filters that fit any number of channels. The
attention looks at the cells within a tenth of the map around the pixel. Averaged over the heads it
is one weight per cell, applied to the features as they are: linear in the values, and the weights
sum to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.layers.chunks import recorded
from fmupsample.layers.norms import convolved
from fmupsample.layers.parts import InParts, in_parts
from fmupsample.ops.memory import on_huge_pages
from fmupsample.upsamplers.anyup.attention import WindowAttention, reach_of
from fmupsample.upsamplers.anyup.config import AnyUpConfig
from fmupsample.upsamplers.anyup.modules import (
    Encoder,
    FeatureEncoder,
    Rotation,
    root_mean_square_norm,
)
from fmupsample.upsamplers.anyup.queries import ProjectedRows
from fmupsample.upsamplers.anyup.tiles import (
    Replayed,
    Stored,
    TiledMap,
    encoded,
    encoded_means,
    linear,
    rotate,
)
from fmupsample.upsamplers.complexity import Size, per_place
from fmupsample.upsamplers.universal import UniversalUpsampler

# A third map saves two convolutions of every pixel where it is not larger than this.
_THREE_MAPS_BYTES = 256 << 20

Queries = Callable[[slice], Tensor]  # rows of the output -> [heads, D, rows, W]


class AnyUp(UniversalUpsampler):
    """Upsample features of any backbone under the guidance of the normalised image.

    ``[B, C, h, w]`` and ``[B, 3, H, W]`` -> ``[B, C, H, W]`` at any ratio >= 1. Kernel weights are
    of K x K whole cells around a pixel's own, K growing with the grid; those outside the window are
    0. They are computed in float32 (float64 for float64 features).

    The normalisations look at the whole image. Where gradients are not recorded, the networks run
    over it in tiles, and the attention in bands of rows.
    """

    name: ClassVar[str] = "anyup"
    bytes_per_pixel: ClassVar[int] = 3000

    def __init__(self, config: AnyUpConfig) -> None:
        super().__init__()
        self.config = config
        e = config.embedding
        self.image = Encoder(3, e)
        self.rotation = Rotation(e)
        self.query_image = Encoder(e, e)
        self.key_image = Encoder(e, e)
        self.key_features = FeatureEncoder(e, config.feature_kernel)
        self.key_joint = Encoder(2 * e, e, 3)
        self.query_around = nn.Conv2d(e, e, 3, padding=1, bias=False)
        self.query_norm, self.key_norm = (nn.Parameter(torch.ones(e)) for _ in range(2))
        self.query, self.key = nn.Conv2d(e, e, 1), nn.Conv2d(e, e, 1)

    def kernel_size_for(self, cells: tuple[int, int]) -> int:
        return 2 * reach_of(cells, self.config.window_ratio) + 1

    def macs(self, channels: int, cells: Size, pixels: Size) -> tuple[int, int]:
        """Encoders and a 3x3 convolution at HR; keys at LR; K^2 (E + C) HR of attention."""
        lr, hr = prod(cells), prod(pixels)
        encoders = (self.image, self.query_image, self.key_image)
        convolution = per_place(*encoders, self.query_around, self.query) * hr
        filters = self.key_features.filters.numel() * channels
        convolution += (filters + per_place(self.key_features, self.key_joint, self.key)) * lr
        k = self.kernel_size_for(cells) ** 2
        return convolution, k * (self.config.embedding + channels) * hr

    def kernels(
        self, x: Tensor, guidance: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Kernel weights ``[B, K*K, H, W]``; zero outside a pixel's window."""
        size = self.check(x, guidance, size)
        with torch.autocast(x.device.type, enabled=False):
            image = self._renormalised(x, guidance)
            x = x.to(image.like.dtype)
            if recorded(x, image[...], *self.parameters()):
                return self._recorded_kernels(x, image[...], size)
            found = None
            for sample in range(len(x)):
                attention, queries = self._attend(x, image, size, sample, 2**62)
                if found is None:
                    shape = (len(x), attention.side**2, *size)
                    found = on_huge_pages(x.new_empty(shape))
                for rows in attention.parts(slice(0, size[0])):
                    found[sample, :, rows] = attention.weights(queries(rows), rows)
                del queries
            assert found is not None
            return found

    def kernels_in_rows(
        self, x: Tensor, guidance: Tensor | InParts | None, size: tuple[int, int], pixels: int
    ) -> Iterator[Tensor]:
        if guidance is None or len(x) * prod(size) <= pixels:
            yield from super().kernels_in_rows(x, guidance, size, pixels)
            return
        guidance = in_parts(guidance)
        size = self.check(x, guidance.like, size)
        image = self._renormalised(x, guidance)
        x = x.to(image.like.dtype)
        budget = pixels * self.bytes_per_pixel // len(x)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            pairs = [self._attend(x, image, size, i, budget // 2) for i in range(len(x))]
        # A band is held here and by who reads it; the larger K, the fewer its rows.
        row = pairs[0][0].side ** 2 * size[1] * x.element_size()
        step = max(1, min(budget // 4 // row, pixels // (len(x) * size[1])))
        for start in range(0, size[0], step):
            rows = slice(start, min(start + step, size[0]))
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                band = self._band(pairs, rows)
            yield band
            del band

    def _recorded_kernels(self, x: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        """The whole in plain layers, for gradients."""
        rotated_image = self.rotation(self.image(image))
        keys = self._keys(x, F.adaptive_avg_pool2d(self.key_image(rotated_image), x.shape[-2:]))
        queries = self.query_image(rotated_image)
        if queries.shape[-2:] != size:
            queries = F.adaptive_avg_pool2d(queries, size)
        normed = root_mean_square_norm(convolved(queries, self.query_around), self.query_norm)
        queries = convolved(normed, self.query).unflatten(1, (self.config.heads, -1))
        found = []
        for key, query in zip(keys, queries, strict=True):
            attention = WindowAttention(key, size, self.config.window_ratio)
            parts = attention.parts(slice(0, size[0]))
            bands = [attention.weights(query[:, :, rows], rows) for rows in parts]
            found.append(torch.cat(bands, 1))
        return torch.stack(found)

    def _keys(self, x: Tensor, image: Tensor) -> Tensor:
        """Keys ``[B, heads, D, h, w]`` of cells, given the image's part ``[B, E, h, w]``."""
        features = self.key_features(F.normalize(x, dim=1))
        joint = self.key_joint(torch.cat([image, features], 1))
        keys = convolved(root_mean_square_norm(joint, self.key_norm), self.key)
        keys = keys.unflatten(1, (self.config.heads, -1))
        return keys * keys.shape[2] ** -0.5

    def _attend(
        self, x: Tensor, image: InParts, size: tuple[int, int], sample: int, budget: int
    ) -> tuple[WindowAttention, Queries]:
        """What makes the weights of one sample; maps may take ``budget`` bytes."""
        e, cells = self.config.embedding, x.shape[-2:]
        whole = tuple(image.shape[-2:])
        one = e * prod(whole) * x.element_size()
        maps = [
            Stored.empty(e, whole, x) if 2 * one <= budget and (wanted < 2 or _small(one)) else None
            for wanted in range(3)
        ]
        source = Replayed(lambda rows: image[sample, :, rows].flatten(1), whole, x.device).then(
            linear(self.image.first), maps[0]
        )
        source = encoded(source, self.image, maps[1]).then(rotate(self.rotation, whole, x))
        keys = source.then(linear(self.key_image.first), maps[1])
        keys = self._keys(
            x[sample : sample + 1], encoded_means(keys, self.key_image, cells, maps[2])[None]
        )
        del maps[2:]
        source = source.then(linear(self.query_image.first))
        source = encoded(source, self.query_image, maps[1])
        return WindowAttention(keys[0], size, self.config.window_ratio), self._queries(
            source, size, x.dtype
        )

    def _queries(self, source: TiledMap, size: tuple[int, int], dtype: torch.dtype) -> Queries:
        """Rows of queries from the map that the encoder of queries gave, at any size."""
        rows_of = ProjectedRows(source, size, self.query_around, self.query_norm, self.query, dtype)
        heads = self.config.heads
        return lambda rows: rows_of(rows).unflatten(1, (heads, -1)).permute(1, 2, 0, 3)

    @staticmethod
    def _band(pairs: list[tuple[WindowAttention, Queries]], rows: slice) -> Tensor:
        """Kernel weights ``[B, K*K, rows, W]``."""
        band = None
        for sample, (attention, queries) in enumerate(pairs):
            for part in attention.parts(rows):
                weights = attention.weights(queries(part), part)
                if band is None:
                    shape = (len(pairs), len(weights), rows.stop - rows.start, weights.shape[2])
                    band = on_huge_pages(weights.new_empty(shape))
                inside = slice(part.start - rows.start, part.stop - rows.start)
                band[sample, :, inside] = weights
        assert band is not None
        return band


def _small(one: int) -> bool:
    return 3 * one <= _THREE_MAPS_BYTES
