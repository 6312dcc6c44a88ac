"""The last step of a map, one axis at a time: from the crop it was made at to its final size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fmupsample.ops.grid import plan_axis


@dataclass(frozen=True)
class Taps:
    """Every target pixel as a weighted sum of a few source pixels.

    Attributes:
        index: int64 ``[n, T]``, source pixels.
        share: float64 ``[n, T]``, summing to 1.
    """

    index: Tensor
    share: Tensor

    def bounds(self) -> tuple[int, int]:
        """First source pixel that is read, and one past the last."""
        return int(self.index.min()), int(self.index.max()) + 1

    def apply(self, part: Tensor, dim: int, first: int) -> Tensor:
        """Resample ``part``, whose index 0 along ``dim`` is source pixel ``first``."""
        shape = [1] * part.ndim
        shape[dim] = -1
        index, share = self.index.to(part.device) - first, self.share.to(part)
        if self.index.shape[1] == 1:
            return part.index_select(dim, index[:, 0])
        out = part.index_select(dim, index[:, 0]) * share[:, 0].reshape(shape)
        for t in range(1, index.shape[1]):
            out.add_(part.index_select(dim, index[:, t]) * share[:, t].reshape(shape))
        return out

    def between(self, lower: Tensor, upper: Tensor, fraction: Tensor) -> Taps:
        """Points between the target pixels ``lower`` and ``upper``, int64 and float64 ``[n]``."""
        if not fraction.any():
            return self[lower]
        index = torch.cat([self.index[lower], self.index[upper]], 1)
        share = [self.share[lower] * (1 - fraction)[:, None], self.share[upper] * fraction[:, None]]
        return Taps(index, torch.cat(share, 1))

    def __getitem__(self, pixels: Tensor | slice) -> Taps:
        return Taps(self.index[pixels], self.share[pixels])


def taps(source: int, target: int, *, averaged: bool) -> Taps:
    """How an axis of ``target`` pixels comes from one of ``source``.

    Args:
        averaged: as ``adaptive_avg_pool`` does; otherwise ``target >= source``, bilinearly.
    """
    pixels = torch.arange(target)
    if source == target:
        return Taps(pixels[:, None], torch.ones(target, 1, dtype=torch.float64))
    if not averaged:
        plan = plan_axis(source, target, True)
        index = torch.stack([plan.base, plan.base + 1], 1).clamp(0, source - 1)
        return Taps(index, torch.stack([1 - plan.fraction, plan.fraction], 1))
    first = pixels * source // target
    counts = -(-(pixels + 1) * source // target) - first
    steps = torch.arange(int(counts.max()))
    share = (steps < counts[:, None]).double() / counts[:, None]
    return Taps((first[:, None] + steps).clamp(max=source - 1), share)
