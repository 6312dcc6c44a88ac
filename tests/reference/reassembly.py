"""Neighbour reassembly as its definition says it, neighbour by neighbour."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import torch
from torch import Tensor


def axis(cells: int, pixels: int, fractional: bool) -> tuple[list[int], list[float]]:
    """Base cell and fraction of every pixel, in rational arithmetic."""
    bases, fractions = [], []
    for p in range(pixels):
        coordinate = Fraction(2 * p + 1, 2) * cells / pixels
        if fractional:
            coordinate -= Fraction(1, 2)
        bases.append(floor(coordinate))
        fractions.append(float(coordinate - floor(coordinate)) if fractional else 0.0)
    return bases, fractions


def reassemble(value: Tensor, weights: Tensor, fractional: bool) -> Tensor:
    """``[B, V, h, w]`` and ``[B, K*K, H, W]`` -> ``[B, V, H, W]``; differentiable."""
    h, w = value.shape[2:]
    height, width = weights.shape[2:]
    k = int(weights.shape[1] ** 0.5)
    (by, fy), (bx, fx) = axis(h, height, fractional), axis(w, width, fractional)
    fy = torch.tensor(fy, dtype=value.dtype)[:, None]
    fx = torch.tensor(fx, dtype=value.dtype)
    out = torch.zeros(*value.shape[:2], height, width, dtype=value.dtype)
    for i in range(k):
        for j in range(k):
            weight = weights[:, i * k + j, None]
            for a in (0, 1):
                for b in (0, 1):
                    rows = (torch.tensor(by) + i - k // 2 + a).clamp(0, h - 1)
                    columns = (torch.tensor(bx) + j - k // 2 + b).clamp(0, w - 1)
                    share = (fy if a else 1 - fy) * (fx if b else 1 - fx)
                    out = out + weight * share * value[:, :, rows][..., columns]
    return out
