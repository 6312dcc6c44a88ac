"""Large maps of one image in tiles of rows, for encoders that run over them without gradients.

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
from torch import Tensor

from fmupsample.ops.memory import on_huge_pages
from fmupsample.upsamplers.encoders.networks import GROUPS
from fmupsample.upsamplers.encoders.winograd import ROWS

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
        self.size, self.device = size, device
        self._pixels = _TILE_PIXELS.get(device.type, _TILE_PIXELS_ACCELERATOR)

    def tiles(self, size: tuple[int, int] | None = None) -> Iterator[slice]:
        """The rows of one tile after the other, of this map or of one of another size."""
        height, width = size or self.size
        step = max(1, self._pixels // width)
        step -= step % ROWS if step > ROWS else 0  # 3x3 convolutions make so many at once
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
        self._make = make

    def read(self, rows: slice) -> Tensor:
        return self._make(rows)

    def then(self, step: Step, onto: Stored | None = None) -> TiledMap:
        make = self._make
        if onto is not None:
            return onto.fill(lambda rows: step(make(rows), rows))
        return Replayed(lambda rows: step(make(rows), rows), self.size, self.device)

    def moments(self) -> tuple[Tensor, Tensor]:
        moments = Moments()
        for rows in self.tiles():
            moments.add(self.read(rows))
        return moments.of_whole()
