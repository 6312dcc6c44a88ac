"""JAFAR, Couairon et al., "JAFAR: Jack up Any Feature at Any Resolution" (2025).

A pixel's query comes from the image. A cell's key is the mean of the image's features over the
cell, modulated by the features to upsample. Each pixel attends to all cells of the map; averaged
over the heads that is one weight per cell, applied to the features as they are: linear in the
values, and the weights sum to 1.

With as many weights for a pixel as there are cells, it is the queries and keys that are kept, not
the weights: these are made a few pixels at a time, while values are reassembled.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.layers.chunks import recorded
from fmupsample.layers.norms import convolved
from fmupsample.layers.parts import InParts, in_parts
from fmupsample.ops.memory import on_huge_pages
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.complexity import Size, per_place
from fmupsample.upsamplers.encoders.image import ImageNetworks
from fmupsample.upsamplers.encoders.maps import Replayed
from fmupsample.upsamplers.encoders.networks import Encoder
from fmupsample.upsamplers.guidance import check_channels
from fmupsample.upsamplers.jafar.attention import attend
from fmupsample.upsamplers.jafar.config import JAFARConfig


class JAFAR(Upsampler, ImageNetworks):
    """Upsample features of the backbone that it was trained for.

    ``[B, C, h, w]`` and the normalised image ``[B, 3, H, W]`` -> ``[B, C, H, W]`` at any
    ratio >= 1. Computed in float32 (float64 for float64 features). The normalisations look at the
    whole image; where gradients are not recorded, the networks run over it in tiles.
    """

    name: ClassVar[str] = "jafar"
    needs_guidance: ClassVar[bool] = True
    uses_ops: ClassVar[bool] = False  # all cells are neighbours: a matrix product
    bytes_per_pixel: ClassVar[int] = 1100

    def __init__(self, config: JAFARConfig) -> None:
        super().__init__()
        self.config = config
        e = config.embedding
        self.add_networks(e, standardised=True)
        self.key_features = Encoder(config.channels, e)
        self.key_gain, self.key_shift = (nn.Conv2d(e, e, 1, bias=False) for _ in range(2))

    def macs(self, channels: int, cells: Size, pixels: Size) -> tuple[int, int]:
        """Encoders and a 3x3 convolution at HR; keys at LR; (E + C) LR HR of attention."""
        lr, hr = prod(cells), prod(pixels)
        keys = per_place(self.key_features, self.key_gain, self.key_shift, self.key)
        return self.image_macs() * hr + keys * lr, lr * (self.config.embedding + channels) * hr

    def kernels(
        self, x: Tensor, guidance: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Queries of the pixels and keys of the cells, ``[B, E + P, H, W]``.

        First the queries; then P planes that hold the keys ``[E, h, w]``, one number after the
        other, and zeros.
        """
        size = self.check(x, guidance, size)
        assert guidance is not None  # checked above: needs_guidance
        with torch.autocast(x.device.type, enabled=False):
            image = guidance.to(torch.promote_types(x.dtype, torch.float32))
            x = x.to(image.dtype)
            if recorded(x, image, *self.parameters()):
                return self._recorded_kernels(x, image, size)
            return self._tiled_kernels(x, in_parts(image), size, 2**62)

    def kernels_in_rows(
        self, x: Tensor, guidance: Tensor | InParts | None, size: tuple[int, int], pixels: int
    ) -> Iterator[Tensor]:
        """All rows in one band, beside which about as much memory is taken as ``pixels`` say."""
        if guidance is None or len(x) * prod(size) <= pixels:
            yield from super().kernels_in_rows(x, guidance, size, pixels)
            return
        guidance = in_parts(guidance)
        size = self.check(x, guidance.like, size)
        guidance = guidance.to(torch.promote_types(x.dtype, torch.float32))
        budget = pixels * self.bytes_per_pixel
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            yield self._tiled_kernels(x.to(guidance.like.dtype), guidance, size, budget)

    def reassemble(self, weights: Tensor, value: Tensor) -> Tensor:
        """``value`` ``[B, V, h, w]``, on the grid that the keys in ``weights`` are for."""
        maps = []
        for queries, one in zip(weights, value, strict=True):
            flat = self._attended(queries, one, queries[: self.config.embedding].flatten(1))
            maps.append(flat.unflatten(1, weights.shape[2:]).to(value.dtype))
        return maps[0][None] if len(maps) == 1 else torch.stack(maps)

    def reassemble_at(self, weights: Tensor, value: Tensor, pixels: Tensor) -> Tensor:
        queries = weights[: self.config.embedding].flatten(1)[:, pixels]
        return self._attended(weights, value, queries).T.to(value.dtype)

    def check(
        self, x: Tensor, guidance: Tensor | None, size: tuple[int, int] | None
    ) -> tuple[int, int]:
        size = super().check(x, guidance, size)
        check_channels(self.name, x, self.config.channels, guidance, 3, stem=True)
        return size

    def _attended(self, weights: Tensor, value: Tensor, queries: Tensor) -> Tensor:
        """``[V, n]`` for queries ``[E, n]``, with the keys in ``weights`` ``[E + P, H, W]``."""
        e, cells = self.config.embedding, prod(value.shape[1:])
        dtype = torch.promote_types(torch.promote_types(weights.dtype, value.dtype), torch.float32)
        keys = weights[e:].flatten()[: e * cells].view(e, cells).to(dtype)
        return attend(queries, keys, value.flatten(1).to(dtype), self.config.heads)

    def _recorded_kernels(self, x: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        """In plain layers, for gradients."""
        queries, means = self.of_image(image, x.shape[-2:], size)
        keys = self._keys(x, means).flatten(1)
        missing = -keys.shape[1] % prod(size)
        return torch.cat([queries, F.pad(keys, (0, missing)).unflatten(1, (-1, *size))], 1)

    def _tiled_kernels(
        self, x: Tensor, image: InParts, size: tuple[int, int], budget: int
    ) -> Tensor:
        """In tiles; maps of the image's size may take ``budget`` bytes beside the result."""
        e, whole = self.config.embedding, tuple(image.shape[-2:])
        planes = -(-e * prod(x.shape[-2:]) // prod(size))
        found = on_huge_pages(x.new_empty(len(x), e + planes, *size))
        for sample, packed in enumerate(found):
            source = Replayed(lambda rows, i=sample: image[i, :, rows].flatten(1), whole, x.device)
            # Where the image is as large as the result, queries take the place of an encoder's map
            # row by row.
            scratch = packed[:e] if size == whole else None
            queries, means = self.of_image_in_tiles(source, x.shape[-2:], size, x, budget, scratch)
            for rows in queries.tiles():
                packed[:e, rows] = queries(rows).transpose(0, 1)
            keys = self._keys(x[sample : sample + 1], means[None]).flatten()
            packed[e:].flatten()[: len(keys)] = keys
            packed[e:].flatten()[len(keys) :] = 0
        return found

    def _keys(self, x: Tensor, image: Tensor) -> Tensor:
        """Keys ``[B, E, h, w]`` of cells, scaled, given the image's part ``[B, E, h, w]``."""
        features = self.key_features(F.normalize(x, dim=1))
        modulated = convolved(features, self.key_gain) * self.standardise(image)
        modulated = modulated + convolved(features, self.key_shift)
        return self.keys_from(modulated, self.config.heads)
