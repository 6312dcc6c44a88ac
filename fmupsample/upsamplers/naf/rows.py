"""The encoders on large images: layer by layer, in tiles of rows, without gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.layers.moments import affine
from fmupsample.upsamplers.encoders.maps import Replayed, Stored, TiledMap
from fmupsample.upsamplers.encoders.winograd import Convolution3x3
from fmupsample.upsamplers.naf.encoder import Encoder


def encoded(image: TiledMap, encoder: Encoder, maps: tuple[Stored, Stored] | None) -> TiledMap:
    """The image after the encoder.

    Args:
        maps: two that the layers fill in turns, the last one the first; ``None``: nothing is
            stored, and all layers are made again whenever the result is read.
    """
    layers, source = list(encoder.layers()), image
    for left, (layer, norm) in zip(reversed(range(len(layers))), layers, strict=True):
        make = _Layer(source, layer, norm)
        if maps is None:
            source = Replayed(make, image.size, image.device)
        else:
            source = maps[left % 2].fill(make)
    return source


class _Layer:
    """A normalisation with SiLU, where there is one, and a convolution: rows -> ``[O, pixels]``."""

    def __init__(self, source: TiledMap, layer: nn.Conv2d, norm: nn.GroupNorm | None) -> None:
        self._source = source
        self._affine = None
        if norm is not None:
            self._affine = [t[0, :, None] for t in affine(norm, *source.moments())]
        self._weight, self._bias = layer.weight.detach(), layer.bias.detach()[:, None]
        self._around: Convolution3x3 | None = None

    def __call__(self, rows: slice) -> Tensor:
        if self._weight.shape[-1] == 1:
            part = self._normalised(rows)
            return torch.addmm(self._bias.to(part), self._weight.flatten(1).to(part), part)
        part = self._with_borders(rows)
        if self._around is None:
            self._around = Convolution3x3(self._weight.to(part), mirrored=True)
        return self._around(part).transpose(0, 1).flatten(1).add_(self._bias.to(part))

    def _normalised(self, rows: slice) -> Tensor:
        part = self._source.read(rows)
        if self._affine is None:
            return part
        scale, shift = self._affine
        return F.silu((part * scale).add_(shift), inplace=True)

    def _with_borders(self, rows: slice) -> Tensor:
        """``[C, rows + 2, W]``: normalised rows with the ones above and below, mirrored beyond."""
        height, width = self._source.size
        inside = slice(max(0, rows.start - 1), min(height, rows.stop + 1))
        part = self._normalised(inside).unflatten(1, (-1, width))
        parts = [part]
        if rows.start == 0:
            parts.insert(0, part[:, min(1, height - 1), None])
        if rows.stop == height:
            parts.append(part[:, -min(2, height), None])
        return torch.cat(parts, 1) if len(parts) > 1 else part
