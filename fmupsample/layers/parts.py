"""Large maps that are never there as a whole: a part is made when it is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class InParts:
    """A floating-point map ``[..., H, W]`` made of another one, pixel by pixel, where it is read.

    It is indexed like a tensor, along rows, columns and leading dimensions but not channels, and
    gives tensors; ``map[...]`` is the whole.

    Args:
        source: ``[..., H, W]``, of any dtype: what is kept.
        make: a part of the source -> that part of the map.
        dtype: of the map.
    """

    def __init__(
        self, source: Tensor, make: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32
    ) -> None:
        self._source, self._make = source, make
        self.like = torch.empty(source.shape, dtype=dtype, device="meta")  # shape and dtype

    @property
    def shape(self) -> torch.Size:
        return self.like.shape

    def __getitem__(self, part: Any) -> Tensor:
        return self._make(self._source[part])

    def unsqueeze(self, dim: int) -> InParts:
        return InParts(self._source.unsqueeze(dim), self._make, self.like.dtype)

    def to(self, dtype: torch.dtype) -> InParts:
        return self.then(lambda part: part.to(dtype), dtype)

    def then(self, more: Callable[[Tensor], Tensor], dtype: torch.dtype) -> InParts:
        """``more`` of this, in ``dtype``."""
        make = self._make
        return InParts(self._source, lambda part: more(make(part)), dtype)


def in_parts(x: Tensor | InParts) -> InParts:
    """A tensor as a map of this kind."""
    return x if isinstance(x, InParts) else InParts(x, lambda part: part, x.dtype)


def cell_means(x: Tensor | InParts, cells: tuple[int, int]) -> Tensor:
    """``adaptive_avg_pool2d`` of ``[B, C, H, W]`` to ``[B, C, h, w]``."""
    if isinstance(x, Tensor):
        return F.adaptive_avg_pool2d(x, cells)
    height, (rows, columns) = x.shape[-2], cells
    means = []
    for row in range(rows):
        pixels = slice(row * height // rows, -(-(row + 1) * height // rows))
        means.append(F.adaptive_avg_pool2d(x[..., pixels, :], (1, columns)))
    return torch.cat(means, -2)
