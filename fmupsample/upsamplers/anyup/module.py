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
from torch import Tensor

from fmupsample.layers.chunks import recorded
from fmupsample.layers.parts import InParts, in_parts
from fmupsample.ops.memory import on_huge_pages
from fmupsample.upsamplers.anyup.attention import WindowAttention, reach_of
from fmupsample.upsamplers.anyup.config import AnyUpConfig
from fmupsample.upsamplers.anyup.features import FeatureEncoder
from fmupsample.upsamplers.complexity import Size, per_place
from fmupsample.upsamplers.encoders.image import ImageNetworks
from fmupsample.upsamplers.encoders.maps import Replayed
from fmupsample.upsamplers.encoders.networks import Encoder
from fmupsample.upsamplers.universal import UniversalUpsampler

Queries = Callable[[slice], Tensor]  # rows of the output -> [heads, D, rows, W]


class AnyUp(UniversalUpsampler, ImageNetworks):
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
        self.add_networks(e)
        self.key_features = FeatureEncoder(e, config.feature_kernel)
        self.key_joint = Encoder(2 * e, e, 3)

    def kernel_size_for(self, cells: tuple[int, int]) -> int:
        return 2 * reach_of(cells, self.config.window_ratio) + 1

    def macs(self, channels: int, cells: Size, pixels: Size) -> tuple[int, int]:
        """Encoders and a 3x3 convolution at HR; keys at LR; K^2 (E + C) HR of attention."""
        lr, hr = prod(cells), prod(pixels)
        filters = self.key_features.filters.numel() * channels
        keys = filters + per_place(self.key_features, self.key_joint, self.key)
        convolution = self.image_macs() * hr + keys * lr
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
        queries, means = self.of_image(image, x.shape[-2:], size)
        queries = queries.unflatten(1, (self.config.heads, -1))
        found = []
        for key, query in zip(self._keys(x, means), queries, strict=True):
            attention = WindowAttention(key, size, self.config.window_ratio)
            parts = attention.parts(slice(0, size[0]))
            bands = [attention.weights(query[:, :, rows], rows) for rows in parts]
            found.append(torch.cat(bands, 1))
        return torch.stack(found)

    def _keys(self, x: Tensor, image: Tensor) -> Tensor:
        """Keys ``[B, heads, D, h, w]`` of cells, given the image's part ``[B, E, h, w]``."""
        features = self.key_features(F.normalize(x, dim=1))
        joint = self.key_joint(torch.cat([image, features], 1))
        return self.keys_from(joint, self.config.heads).unflatten(1, (self.config.heads, -1))

    def _attend(
        self, x: Tensor, image: InParts, size: tuple[int, int], sample: int, budget: int
    ) -> tuple[WindowAttention, Queries]:
        """What makes the weights of one sample; maps may take ``budget`` bytes."""
        source = Replayed(
            lambda rows: image[sample, :, rows].flatten(1), tuple(image.shape[-2:]), x.device
        )
        queries, means = self.of_image_in_tiles(source, x.shape[-2:], size, x, budget)
        keys = self._keys(x[sample : sample + 1], means[None])[0]
        heads = self.config.heads

        def rows_of(rows: slice) -> Tensor:
            return queries(rows).unflatten(1, (heads, -1)).permute(1, 2, 0, 3)

        return WindowAttention(keys, size, self.config.window_ratio), rows_of

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
