"""The 1x1 networks of AnyUp on large maps, in tiles of rows and without gradients.

A group normalisation needs the statistics of the whole map before any of it can go on. So every
layer is a pass over the map, tile by tile, that also takes the statistics for the next one. Two
kinds of maps share this way of working:

* :class:`Stored` maps are there as a whole, and are overwritten pass by pass;
* :class:`Replayed` maps are only a recipe: a tile is made from the image whenever it is read, all
  layers up to there again. That takes several times the arithmetic, and no memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.layers.moments import affine
from fmupsample.ops.grid import cell_shares
from fmupsample.ops.memory import on_huge_pages
from fmupsample.upsamplers.anyup.config import GROUPS
from fmupsample.upsamplers.anyup.modules import Encoder, ResidualBlock, Rotation, rotated

# Pixels of a tile: 128 channels of them fit the caches of a processor, or fill an accelerator.
_TILE_PIXELS = {"cpu": 2**12}
_TILE_PIXELS_ACCELERATOR = 2**18

Step = Callable[[Tensor, slice], Tensor]  # a tile [E, pixels] and its rows -> the next tile


class Moments:
    """Mean and variance of groups of channels, ``[1, groups]`` each, from tiles ``[C, pixels]``."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # of the numbers and of their squares, [2, groups]
        self._count = 0

    def add(self, tile: Tensor) -> None:
        if self._sums is None:
            wide = torch.float32 if tile.device.type == "mps" else torch.float64
            # Nothing small is kept per tile: between large tiles it would fragment the heap.
            self._sums, self._dtype = tile.new_zeros(2, GROUPS, dtype=wide), tile.dtype
        channels = torch.stack([tile.sum(1), torch.linalg.vector_norm(tile, dim=1).square_()])
        self._sums += channels.unflatten(1, (GROUPS, -1)).sum(2)
        self._count += tile.numel() // GROUPS

    def of_whole(self) -> tuple[Tensor, Tensor]:
        assert self._sums is not None
        mean, square = (self._sums / self._count).unbind(0)
        variance = (square - mean.square()).clamp_min(0)
        return mean[None].to(self._dtype), variance[None].to(self._dtype)


class TiledMap(ABC):
    """A map ``[E, H, W]`` of one image that is read in tiles of rows."""

    def __init__(self, size: tuple[int, int], device: torch.device) -> None:
        self.size = size
        self._pixels = _TILE_PIXELS.get(device.type, _TILE_PIXELS_ACCELERATOR)

    def tiles(self, size: tuple[int, int] | None = None) -> Iterator[slice]:
        """The rows of one tile after the other, of this map or of one of another size."""
        height, width = size or self.size
        step = max(1, self._pixels // width)
        for row in range(0, height, step):
            yield slice(row, min(row + step, height))

    @abstractmethod
    def read(self, rows: slice) -> Tensor:
        """Some rows ``[E, pixels]``; a step that continues the map may overwrite them."""

    @abstractmethod
    def then(self, step: Step, onto: Stored | None = None) -> TiledMap:
        """This map after one more step.

        A stored map is overwritten, or where ``onto`` is given, left as it is and that one filled.
        """

    @abstractmethod
    def moments(self) -> tuple[Tensor, Tensor]:
        """Of the groups of channels of the whole map."""


class Stored(TiledMap):
    """A map in memory.

    Args:
        data: ``[E, H, W]``, contiguous; what is in it need not be set.
    """

    def __init__(self, data: Tensor) -> None:
        super().__init__((data.shape[1], data.shape[2]), data.device)
        self.data = data
        self._moments: Moments | None = None

    @classmethod
    def empty(cls, channels: int, size: tuple[int, int], like: Tensor) -> Stored:
        return cls(on_huge_pages(like.new_empty(channels, *size)))

    def read(self, rows: slice) -> Tensor:
        return self.data[:, rows].flatten(1)

    def then(self, step: Step, onto: Stored | None = None) -> Stored:
        return (onto or self).fill(lambda rows: step(self.read(rows), rows))

    def fill(self, make: Callable[[slice], Tensor]) -> Stored:
        """Every tile anew."""
        moments = Moments()
        for rows in self.tiles():
            tile, made = self.read(rows), make(rows)
            if made.data_ptr() != tile.data_ptr():
                tile.copy_(made)
            moments.add(tile)
        self._moments = moments
        return self

    def moments(self) -> tuple[Tensor, Tensor]:
        assert self._moments is not None  # filled before
        return self._moments.of_whole()


class Replayed(TiledMap):
    """A map that is made again whenever it is read.

    Args:
        make: the rows of a tile -> the tile, which nobody else holds.
    """

    def __init__(
        self, make: Callable[[slice], Tensor], size: tuple[int, int], device: torch.device
    ) -> None:
        super().__init__(size, device)
        self._make, self._device = make, device

    def read(self, rows: slice) -> Tensor:
        return self._make(rows)

    def then(self, step: Step, onto: Stored | None = None) -> TiledMap:
        make = self._make
        if onto is not None:
            return onto.fill(lambda rows: step(make(rows), rows))
        return Replayed(lambda rows: step(make(rows), rows), self.size, self._device)

    def moments(self) -> tuple[Tensor, Tensor]:
        moments = Moments()
        for rows in self.tiles():
            moments.add(self.read(rows))
        return moments.of_whole()


class CellMeans:
    """Means over cells of a map that comes in tiles of rows, as ``adaptive_avg_pool2d`` does."""

    def __init__(self, cells: tuple[int, int], size: tuple[int, int]) -> None:
        self.cells, self.size = cells, size
        self._across = cell_shares(cells[1], size[1], slice(0, cells[1]), slice(0, size[1]))
        self._total: Tensor | None = None

    def add(self, tile: Tensor, rows: slice) -> None:
        (h, _), (height, width) = self.cells, self.size
        if self._total is None:
            self._total = tile.new_zeros(len(tile), *self.cells)
        # A row of cells may share its last row of pixels with the next.
        cells = slice(rows.start * h // height, min(h, -(-rows.stop * h // height)))
        down = cell_shares(h, height, cells, rows).to(tile)
        sums = torch.matmul(down, tile.unflatten(1, (-1, width)))  # [C, cells, W]
        self._total[:, cells] += torch.matmul(sums, self._across.T.to(tile))

    def whole(self) -> Tensor:
        assert self._total is not None
        return self._total


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


def at_size(source: TiledMap, rows: slice, size: tuple[int, int]) -> Tensor:
    """Rows ``[E, rows, W]`` of the map at another size, as ``adaptive_avg_pool2d`` makes it."""

    def read(region: slice) -> Tensor:
        return source.read(region).unflatten(1, (-1, source.size[1]))

    return averaged(read, source.size, rows, size)


def averaged(
    read: Callable[[slice], Tensor], own: tuple[int, int], rows: slice, size: tuple[int, int]
) -> Tensor:
    """Rows ``[E, rows, W]`` at another size of a map of ``own`` size, given what reads its rows."""
    if size == own:
        return read(rows)
    region = slice(rows.start * own[0] // size[0], -(-rows.stop * own[0] // size[0]))
    part = read(region)
    down = cell_shares(size[0], own[0], rows, region).to(part)
    across = cell_shares(size[1], own[1], slice(0, size[1]), slice(0, own[1])).to(part)
    return down @ part @ across.T


def _matrix(layer: nn.Conv2d) -> Tensor:
    return layer.weight.detach().flatten(1)
