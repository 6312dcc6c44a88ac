"""NAF, Chambon et al., "NAF: Zero-Shot Feature Upsampling via Neighborhood Attention Filtering".

An encoder of the image gives every pixel a query, turned by the pixel's place; a cell's key is the
mean of the queries over the cell. Each pixel attends to 9 x 9 cells around it. The features are not
looked at, they are what is weighed: each head weighs its own quarter of their channels. Weights sum
to 1, so results stay in the range of the features; but with a set of weights for each head the
method is not linear in any map of values, only in the features themselves.
"""

from __future__ import annotations

from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fmupsample.errors import ShapeError
from fmupsample.layers.chunks import recorded
from fmupsample.layers.parts import in_parts
from fmupsample.ops.memory import on_huge_pages
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.complexity import Size, per_place
from fmupsample.upsamplers.encoders.averages import CellMeans, at_size
from fmupsample.upsamplers.encoders.maps import Replayed, Stored, TiledMap
from fmupsample.upsamplers.naf.attention import NeighbourhoodAttention
from fmupsample.upsamplers.naf.config import NAFConfig
from fmupsample.upsamplers.naf.encoder import Encoder, Rotation
from fmupsample.upsamplers.naf.rows import encoded
from fmupsample.upsamplers.universal import UniversalUpsampler

# Maps of the image's size are stored while they take at most so many bytes; beyond, they are made
# again whenever they are read.
_STORED_BYTES = 4 << 30
_MOST = 4  # images of more than 4 times the output's size are made smaller first


class NAF(UniversalUpsampler):
    """Upsample features of any backbone under the guidance of the normalised image.

    ``[B, C, h, w]``, C a multiple of the heads, and ``[B, 3, H, W]`` -> ``[B, C, H, W]`` at any
    ratio >= 1. Computed in float32 (float64 for float64 features). Grids of fewer than 9 cells,
    which the published code refuses, are attended to as a whole.
    """

    name: ClassVar[str] = "naf"
    linear_in_value: bool = False
    neighbours: str | None = None
    uses_ops: ClassVar[bool] = False
    # What the other heads for any backbone do by their weights, this one cannot.
    reassemble = Upsampler.reassemble
    reassemble_at = Upsampler.reassemble_at

    def __init__(self, config: NAFConfig) -> None:
        super().__init__()
        self.config = c = config
        self.pointwise = Encoder(c.embedding // 2, 1, c.blocks)
        self.spatial = Encoder(c.embedding // 2, 3, c.blocks)
        self.rotation = Rotation(c.embedding, c.rotary_heads)

    def macs(self, channels: int, cells: Size, pixels: Size) -> tuple[int, int]:
        """Two encoders at HR; K^2 (E + C) HR of attention."""
        hr, k = prod(pixels), prod(min(n, self.config.kernel_size) for n in cells)
        convolution = per_place(self.pointwise, self.spatial) * hr
        return convolution, k * (self.config.embedding + channels) * hr

    def forward(
        self, x: Tensor, guidance: Tensor | None = None, *, size: tuple[int, int] | None = None
    ) -> Tensor:
        size = self.check(x, guidance, size)
        assert guidance is not None  # checked above: needs_guidance
        with torch.autocast(x.device.type, enabled=False):
            image = self._renormalised(x, guidance)
            if any(n > _MOST * m for n, m in zip(image.shape[-2:], size, strict=True)):
                shape = [min(n, *(_MOST * m for m in size)) for n in image.shape[-2:]]
                image = in_parts(F.interpolate(image[...], shape, mode="bilinear"))
            values = x.to(image.like.dtype)
            if recorded(values, image[...], *self.parameters()):
                return self._recorded(values, image[...], size).to(x.dtype)
            out = on_huge_pages(x.new_empty(*x.shape[:2], *size))
            for sample in range(len(x)):
                self._fill(out[sample], values[sample], image[sample], size)
            return out

    def check(
        self, x: Tensor, guidance: Tensor | None, size: tuple[int, int] | None
    ) -> tuple[int, int]:
        size = super().check(x, guidance, size)
        if x.shape[1] % self.config.heads:
            raise ShapeError(
                f"{self.name} splits the channels among {self.config.heads} heads: {x.shape[1]} "
                "channels are no multiple of that"
            )
        return size

    def _recorded(self, x: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        """In plain layers, for gradients."""
        found = torch.cat([self.pointwise(image), self.spatial(image)], 1)
        if found.shape[-2:] != size:
            found = F.adaptive_avg_pool2d(found, size)
        queries = self.rotation(found, slice(0, size[0]), size)
        keys = F.adaptive_avg_pool2d(queries, x.shape[-2:])
        return torch.stack([
            self._attention(key, value, size)(query, slice(0, size[0]))
            for query, key, value in zip(queries, keys, x, strict=True)
        ])  # fmt: skip

    def _attention(
        self, keys: Tensor, values: Tensor, size: tuple[int, int]
    ) -> NeighbourhoodAttention:
        keys = keys.unflatten(0, (self.config.heads, -1))
        keys = keys * keys.shape[1] ** -0.5
        return NeighbourhoodAttention(keys, values, size, self.config.kernel_size)

    def _fill(self, out: Tensor, x: Tensor, image: Tensor, size: tuple[int, int]) -> None:
        """The output ``[C, H, W]`` of one sample, in tiles of rows."""
        source, stored = self._encoded(image, x)
        # Where queries need not be averaged they are turned in place once, and then read.
        in_place = stored is not None and source.size == size

        def queries(rows: slice) -> Tensor:
            part = stored[:, rows] if in_place else at_size(source, rows, size)
            return self.rotation(part, rows, size)

        means = CellMeans((x.shape[-2], x.shape[-1]), size)
        for rows in source.tiles(size):
            means.add(queries(rows).flatten(1), rows)
        attend = self._attention(means.whole(), x, size)
        for rows in source.tiles(size):
            out[:, rows] = attend(stored[:, rows] if in_place else queries(rows), rows)

    def _encoded(self, image: Tensor, like: Tensor) -> tuple[TiledMap, Tensor | None]:
        """The encoders' outputs ``[E, H', W']``, as a map and, if that is stored, as a tensor."""
        e, size = self.config.embedding, (image.shape[-2], image.shape[-1])
        source = Replayed(lambda rows: image[:, rows].flatten(1), size, image.device)
        stored, halves, scratch = None, (None, None), None
        if 3 * e // 2 * prod(size) * like.element_size() <= _STORED_BYTES:
            stored = on_huge_pages(like.new_empty(e, *size))
            halves, scratch = stored.chunk(2), Stored.empty(e // 2, size, like)
        parts = [
            encoded(source, encoder, None if half is None else (Stored(half), scratch))
            for half, encoder in zip(halves, (self.pointwise, self.spatial), strict=True)
        ]
        return Replayed(
            lambda rows: torch.cat([part.read(rows) for part in parts]), size, image.device
        ), stored
