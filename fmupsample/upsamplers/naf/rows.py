"""The encoders on large images: layer by layer, in bands of rows, without gradients.

A group normalisation needs the statistics of the whole map before the next layer can go on. A layer
may be stored as a whole, or be a recipe only: then a band is made from the image whenever it is
read, all layers up to there again. That takes several times the arithmetic, and no memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.layers.moments import affine
from fmupsample.upsamplers.anyup.tiles import Moments
from fmupsample.upsamplers.anyup.winograd import Convolution3x3
from fmupsample.upsamplers.naf.encoder import Encoder

# Pixels of a band: a convolution reads a row more above and below.
_BAND_PIXELS = {"cpu": 2**14}
_BAND_PIXELS_ACCELERATOR = 2**20


def bands(size: tuple[int, int], device: torch.device) -> Iterator[slice]:
    """The rows of one band after the other, of a map of this size."""
    pixels = _BAND_PIXELS.get(device.type, _BAND_PIXELS_ACCELERATOR)
    step = max(1, pixels // size[1])
    for row in range(0, size[0], step):
        yield slice(row, min(row + step, size[0]))


class RowMap(ABC):
    """A map ``[C, H, W]`` that is read in bands of rows."""

    def __init__(self, size: tuple[int, int], device: torch.device) -> None:
        self.size, self.device = size, device

    @abstractmethod
    def read(self, rows: slice) -> Tensor:
        """``[C, rows, W]``, not to be overwritten."""

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of the groups of channels, ``[1, groups]`` each."""
        moments = Moments()
        for rows in bands(self.size, self.device):
            moments.add(self.read(rows).flatten(1))
        return moments.of_whole()


class ReadMap(RowMap):
    """A map that a function gives the rows of."""

    def __init__(
        self, read: Callable[[slice], Tensor], size: tuple[int, int], device: torch.device
    ) -> None:
        super().__init__(size, device)
        self.read = read  # type: ignore[method-assign]

    def read(self, rows: slice) -> Tensor:
        raise NotImplementedError  # replaced above


class StoredMap(RowMap):
    """Another map, kept in ``data`` ``[C, H, W]``."""

    def __init__(self, source: RowMap, data: Tensor) -> None:
        super().__init__(source.size, source.device)
        self._data, moments = data, Moments()
        for rows in bands(self.size, self.device):
            data[:, rows] = source.read(rows)
            moments.add(data[:, rows].flatten(1))
        self._moments = moments.of_whole()

    def read(self, rows: slice) -> Tensor:
        return self._data[:, rows]

    def moments(self) -> tuple[Tensor, Tensor]:
        return self._moments


class ConvolvedMap(RowMap):
    """A map after a normalisation with SiLU, where there is one, and a convolution."""

    def __init__(self, source: RowMap, layer: nn.Conv2d, norm: nn.GroupNorm | None) -> None:
        super().__init__(source.size, source.device)
        self._source, self._layer = source, layer
        self._affine = None
        if norm is not None:
            self._affine = [t[0, :, None, None] for t in affine(norm, *source.moments())]
        self._winograd: Convolution3x3 | None = None

    def read(self, rows: slice) -> Tensor:
        weight, bias = (t.detach() for t in (self._layer.weight, self._layer.bias))
        if weight.shape[-1] == 1:
            part = self._normalised(self._source.read(rows))
            found = weight.to(part).flatten(1) @ part.flatten(1)
            return found.add_(bias.to(part)[:, None]).unflatten(1, part.shape[1:])
        part = self._with_borders(rows)
        if self._winograd is None:
            self._winograd = Convolution3x3(weight.to(part), mirrored=True)
        return self._winograd(part).add_(bias.to(part)[:, None]).transpose(0, 1)

    def _normalised(self, part: Tensor) -> Tensor:
        if self._affine is None:
            return part
        scale, shift = self._affine
        return F.silu((part * scale).add_(shift), inplace=True)

    def _with_borders(self, rows: slice) -> Tensor:
        """Normalised rows with the ones above and below: mirrored beyond the map."""
        height = self.size[0]
        inside = slice(max(0, rows.start - 1), min(height, rows.stop + 1))
        part = self._normalised(self._source.read(inside))
        parts = [part]
        if rows.start == 0:
            parts.insert(0, part[:, min(1, height - 1), None])
        if rows.stop == height:
            parts.append(part[:, -min(2, height), None])
        return torch.cat(parts, 1) if len(parts) > 1 else part


def encoded(image: RowMap, encoder: Encoder, maps: tuple[Tensor, Tensor] | None) -> RowMap:
    """The image after the encoder.

    Args:
        maps: two ``[C, H, W]`` that the layers fill in turns, the last one the first; ``None``:
            nothing is stored.
    """
    layers, source = list(encoder.layers()), image
    for left, (layer, norm) in zip(reversed(range(len(layers))), layers, strict=True):
        source = ConvolvedMap(source, layer, norm)
        if maps is not None:
            source = StoredMap(source, maps[left % 2])
    return source
