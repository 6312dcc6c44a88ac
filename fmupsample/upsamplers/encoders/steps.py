"""The 1x1 layers of an image's encoders on tiled maps, without gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.layers.moments import affine
from fmupsample.upsamplers.encoders.averages import CellMeans
from fmupsample.upsamplers.encoders.maps import Moments, Step, Stored, TiledMap
from fmupsample.upsamplers.encoders.networks import Encoder, ResidualBlock, Rotation, rotated


class _Branch:
    """The branch of a residual block, once the statistics of its hidden map are known.

    Args:
        source: what the block is applied to.
        scratch: filled with the hidden map; without one it is made again where it is read.
        look: shown every tile of the source.
    """

    def __init__(
        self,
        block: ResidualBlock,
        source: TiledMap,
        scratch: Stored | None = None,
        look: Callable[[Tensor, slice], None] | None = None,
    ) -> None:
        self._first = _NormedSiLU(block.norm1, source.moments())
        self._weight = _matrix(block.conv1)
        self._scratch = scratch
        moments = Moments()
        for rows in source.tiles():
            tile = source.read(rows)
            if look is not None:
                look(tile, rows)
            moments.add(self._hidden(tile, None if scratch is None else scratch.read(rows)))
        self._second = _NormedSiLU(block.norm2, moments.of_whole())

    def __call__(self, tile: Tensor, rows: slice) -> Tensor:
        """What the block's second convolution is given."""
        kept = self._scratch is not None
        return self._second(self._scratch.read(rows) if kept else self._hidden(tile))

    def _hidden(self, tile: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.mm(self._weight.to(tile), self._first(tile), out=out)


class _NormedSiLU:
    """``SiLU(GN(tile))`` for a normalisation with known statistics."""

    def __init__(self, norm: nn.GroupNorm, moments: tuple[Tensor, Tensor]) -> None:
        scale, shift = affine(norm, *moments)
        self._scale, self._shift = scale[0, :, None], shift[0, :, None]

    def __call__(self, tile: Tensor) -> Tensor:
        return F.silu((tile * self._scale).add_(self._shift), inplace=True)


def linear(layer: nn.Conv2d) -> Step:
    """A 1x1 convolution."""
    weight = _matrix(layer)
    return lambda tile, rows: weight.to(tile) @ tile


def rotate(rotation: Rotation, size: tuple[int, int], like: Tensor) -> Step:
    """The rotary embedding. Angles add up, and so their cosines need few products."""
    down, across = (angle.detach() for angle in rotation.angles(size, like))
    sines = [(a.cos(), a.sin()) for a in (down[:, :, None], across[:, None])]

    def step(tile: Tensor, rows: slice) -> Tensor:
        (cos_y, sin_y), (cos_x, sin_x) = sines
        cos_y, sin_y = cos_y[:, rows], sin_y[:, rows]
        cos = (cos_y * cos_x).addcmul_(sin_y, sin_x, value=-1)
        sin = (sin_y * cos_x).addcmul_(cos_y, sin_x)
        return rotated(tile.unflatten(1, (-1, size[1])), cos, sin).flatten(1)

    return step


def refined(source: TiledMap, block: ResidualBlock, scratch: Stored | None = None) -> TiledMap:
    """The source after a residual block."""
    branch, weight = _Branch(block, source, scratch), _matrix(block.conv2)

    def step(tile: Tensor, rows: slice) -> Tensor:
        return tile.addmm_(weight.to(tile), branch(tile, rows))

    return source.then(step)


def encoded(source: TiledMap, encoder: Encoder, scratch: Stored | None = None) -> TiledMap:
    """The source, which the encoder's first convolution made, after its residual blocks."""
    for block in encoder.blocks:
        source = refined(source, block, scratch)
    return source


def encoded_means(
    source: TiledMap, encoder: Encoder, cells: tuple[int, int], scratch: Stored | None = None
) -> Tensor:
    """Means over cells of what :func:`encoded` gives, ``[E, h, w]``.

    The last convolution commutes with taking means: it is applied to these.
    """
    *blocks, last = encoder.blocks
    for block in blocks:
        source = refined(source, block, scratch)
    means, hidden = (CellMeans(cells, source.size) for _ in range(2))
    branch = _Branch(last, source, scratch, means.add)
    for rows in source.tiles():
        # With a scratch map the source is not looked at again.
        tile = source.read(rows) if scratch is None else scratch.read(rows)
        hidden.add(branch(tile, rows), rows)
    weight = _matrix(last.conv2).to(hidden.whole())
    return means.whole() + torch.einsum("oe,ehw->ohw", weight, hidden.whole())


def _matrix(layer: nn.Conv2d) -> Tensor:
    return layer.weight.detach().flatten(1)
