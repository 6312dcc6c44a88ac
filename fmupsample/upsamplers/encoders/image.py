"""What AnyUp and JAFAR make of the image: queries of pixels, and the cells' share in the keys."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.layers.norms import convolved
from fmupsample.upsamplers.complexity import per_place
from fmupsample.upsamplers.encoders.averages import at_size
from fmupsample.upsamplers.encoders.maps import Moments, Stored, TiledMap
from fmupsample.upsamplers.encoders.networks import (
    GROUPS,
    Encoder,
    Rotation,
    root_mean_square_norm,
)
from fmupsample.upsamplers.encoders.steps import encoded, encoded_means, linear, rotate
from fmupsample.upsamplers.encoders.winograd import Convolution3x3

# A third map saves two convolutions of every pixel where all take no more than this.
_THREE_MAPS_BYTES = 256 << 20


class ImageNetworks(nn.Module):
    """Networks that an upsampler inherits, with two ways to run them.

    The image is encoded and turned by the place. One encoder makes queries of that, another what is
    averaged over each cell for its key.
    """

    def add_networks(self, channels: int, *, standardised: bool = False) -> None:
        """Make the layers, of E = ``channels``.

        ``standardised``: queries pass a group normalisation before their 3x3 convolution.
        """
        e = channels
        self.image = Encoder(3, e)
        self.rotation = Rotation(e)
        self.query_image = Encoder(e, e)
        self.key_image = Encoder(e, e)
        self.standardise = nn.GroupNorm(GROUPS, e, affine=False) if standardised else None
        self.query_around = nn.Conv2d(e, e, 3, padding=1, bias=False)
        self.query_norm, self.key_norm = (nn.Parameter(torch.ones(e)) for _ in range(2))
        self.query, self.key = nn.Conv2d(e, e, 1), nn.Conv2d(e, e, 1)

    def image_macs(self) -> int:
        """Multiply-adds at each pixel."""
        encoders = (self.image, self.query_image, self.key_image)
        return per_place(*encoders, self.query_around, self.query)

    def keys_from(self, joint: Tensor, heads: int) -> Tensor:
        """Keys ``[B, E, h, w]``, scaled for so many heads, of what image and features gave."""
        keys = convolved(root_mean_square_norm(joint, self.key_norm), self.key)
        return keys * (keys.shape[1] // heads) ** -0.5

    def of_image(
        self, image: Tensor, cells: tuple[int, int], size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Queries ``[B, E, H, W]`` and means ``[B, E, h, w]``, in plain layers, for gradients."""
        turned = self.rotation(self.image(image))
        means = F.adaptive_avg_pool2d(self.key_image(turned), cells)
        queries = self.query_image(turned)
        if queries.shape[-2:] != size:
            queries = F.adaptive_avg_pool2d(queries, size)
        if self.standardise is not None:
            queries = self.standardise(queries)
        queries = convolved(queries, self.query_around)
        return convolved(root_mean_square_norm(queries, self.query_norm), self.query), means

    def of_image_in_tiles(
        self,
        image: TiledMap,
        cells: tuple[int, int],
        size: tuple[int, int],
        like: Tensor,
        budget: int,
        scratch: Tensor | None = None,
    ) -> tuple[Queries, Tensor]:
        """The same for one image, without gradients.

        Args:
            image: three channels.
            like: of the dtype and on the device to compute in.
            budget: bytes that maps of the image's size may take; where two maps do not fit, all
                layers are made again whenever they are read.
            scratch: ``[E, H', W']`` of the image's size, to use as one of the maps.

        Returns:
            Queries, and means ``[E, h, w]``.
        """
        e = len(self.query_norm)
        one = e * prod(image.size) * like.element_size()
        affordable = budget // one + (scratch is not None)
        maps: list[Stored | None] = [None] * 3
        if affordable >= 2:
            maps[0] = Stored.empty(e, image.size, like)
            maps[1] = Stored.empty(e, image.size, like) if scratch is None else Stored(scratch)
        if affordable >= 3 and 3 * one <= _THREE_MAPS_BYTES:
            maps[2] = Stored.empty(e, image.size, like)
        source = encoded(image.then(linear(self.image.first), maps[0]), self.image, maps[1])
        source = source.then(rotate(self.rotation, image.size, like))
        keys = source.then(linear(self.key_image.first), maps[1])
        means = encoded_means(keys, self.key_image, cells, maps[2])
        source = source.then(linear(self.query_image.first))
        return Queries(self, encoded(source, self.query_image, maps[1]), size, like.dtype), means


class Queries:
    """Queries of the pixels as a function of rows, without gradients.

    The encoder's map is averaged to the size of the output; a 3x3 convolution, which sees zeros
    around the map, RMS normalisation and a projection follow.

    Args:
        networks: whose layers these are.
        source: ``[E, H', W']``, what the encoder of queries gave.
        size: ``(H, W)`` of the output.
        dtype: of the queries.
    """

    def __init__(
        self,
        networks: ImageNetworks,
        source: TiledMap,
        size: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        self._source, self._size = source, size
        self._around = Convolution3x3(networks.query_around.weight.to(dtype))
        project, norm = networks.query, networks.query_norm
        self._weight = (project.weight[:, :, 0, 0] * norm).detach().to(dtype)
        self._bias = project.bias.detach().to(dtype)[:, None]
        self._affine = None
        if networks.standardise is not None:
            self._affine = self._standardised(networks.standardise)

    def tiles(self) -> Iterator[slice]:
        """All rows, a number at a time that is worth one call."""
        return self._source.tiles(self._size)

    def __call__(self, rows: slice) -> Tensor:
        """``[rows, E, W]``."""
        first, last = max(0, rows.start - 1), min(self._size[0], rows.stop + 1)
        part = at_size(self._source, slice(first, last), self._size)
        if self._affine is not None:
            scale, shift = self._affine
            part = torch.addcmul(shift, part, scale)
        beyond = (0, 0, first - rows.start + 1, rows.stop + 1 - last)
        found = self._around(F.pad(part, beyond) if any(beyond) else part)  # [rows, E, W]
        eps = torch.finfo(found.dtype).eps
        power = torch.linalg.vector_norm(found, dim=1, keepdim=True).square_()
        scale = power.div_(found.shape[1]).add_(eps).rsqrt_()
        return torch.matmul(self._weight, found).mul_(scale).add_(self._bias)

    def _standardised(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """Scale and shift of the normalisation, each ``[E, 1, 1]``."""
        if self._size == self._source.size:
            mean, variance = self._source.moments()
        else:
            moments = Moments()
            for rows in self.tiles():
                moments.add(at_size(self._source, rows, self._size).flatten(1))
            mean, variance = moments.of_whole()
        repeat = norm.num_channels // norm.num_groups
        scale = (variance + norm.eps).rsqrt()
        both = torch.cat([scale, -mean * scale]).repeat_interleave(repeat, 1)[:, :, None, None]
        return both[0], both[1]
