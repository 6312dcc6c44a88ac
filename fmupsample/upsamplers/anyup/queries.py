"""Queries of output pixels from the map of an encoder, some rows at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.upsamplers.anyup.tiles import Moments, TiledMap, at_size
from fmupsample.upsamplers.anyup.winograd import Convolution3x3


class ProjectedRows:
    """Queries as functions of rows: a 3x3 convolution, RMS normalisation, and a projection.

    Without gradients. The map is first averaged to the size of the output.

    Args:
        source: ``[E, H', W']``.
        size: ``(H, W)`` of the output.
        around: the 3x3 convolution, without bias, which sees zeros around the map.
        norm: ``[E]``, the weight of the RMS normalisation.
        project: a 1x1 convolution with bias.
        dtype: of the queries.
        standardise: what normalises the averaged map before the convolution, without parameters.
    """

    def __init__(
        self,
        source: TiledMap,
        size: tuple[int, int],
        around: nn.Conv2d,
        norm: Tensor,
        project: nn.Conv2d,
        dtype: torch.dtype,
        standardise: nn.GroupNorm | None = None,
    ) -> None:
        self._source, self._size = source, size
        self._around = Convolution3x3(around.weight.to(dtype))
        self._weight = (project.weight[:, :, 0, 0] * norm).detach().to(dtype)
        self._bias = project.bias.detach().to(dtype)[:, None]
        self._affine = None if standardise is None else self._standardised(standardise)

    def __call__(self, rows: slice) -> Tensor:
        """Queries ``[rows, E, W]``."""
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
        """Scale and shift, each ``[E, 1, 1]``."""
        if self._size == self._source.size:
            mean, variance = self._source.moments()
        else:
            moments = Moments()
            for rows in self._source.tiles(self._size):
                moments.add(at_size(self._source, rows, self._size).flatten(1))
            mean, variance = moments.of_whole()
        repeat = norm.num_channels // norm.num_groups
        scale = (variance + norm.eps).rsqrt()
        both = torch.cat([scale, -mean * scale]).repeat_interleave(repeat, 1)[:, :, None, None]
        return both[0], both[1]
