"""Whole-cell neighbours, one explicit gather at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from reference.reassembly import axis


def gathered(x: Tensor, size: tuple[int, int], kernel_size: int) -> tuple[Tensor, Tensor]:
    """Neighbours ``[B, C, K*K, H, W]`` of ``[B, C, h, w]``, zeros outside; and which exist."""
    h, w = x.shape[2:]
    rows, columns = (torch.tensor(axis(n, m, False)[0]) for n, m in zip((h, w), size, strict=True))
    near, there = [], []
    for i in range(kernel_size):
        for j in range(kernel_size):
            r, c = rows + i - kernel_size // 2, columns + j - kernel_size // 2
            inside = ((r >= 0) & (r < h))[:, None] & ((c >= 0) & (c < w))
            near.append(x[:, :, r.clamp(0, h - 1)][..., c.clamp(0, w - 1)] * inside)
            there.append(inside)
    return torch.stack(near, 2), torch.stack(there)


def nearest(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The cell that holds each pixel."""
    return gathered(x, size, 1)[0][:, :, 0]
