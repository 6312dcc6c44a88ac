"""Bilinear samples near every output pixel, at positions that a network chose."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pixel_grid(cells: tuple[int, int], pixels: tuple[int, int], like: Tensor) -> Tensor:
    """Where output pixels lie on the LR grid, x and y in cells: ``[H, W, 2]``.

    ``align_corners=False``: pixel P is at ``(P + 1/2) h / H - 1/2``.
    """
    axes = [
        ((2 * torch.arange(n, dtype=torch.float64) + 1) * m / (2 * n) - 0.5).to(like)
        for m, n in zip(cells, pixels, strict=True)
    ]
    y, x = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([x, y], -1)


def sample(value: Tensor, positions: Tensor) -> Tensor:
    """Bilinear samples of ``value`` ``[B, V, h, w]``; beyond the border, the border's.

    Args:
        positions: ``[B, H, W, 2]``, x and y in cells; the centre of the first cell is at 0.

    Returns:
        ``[B, V, H, W]``, in the dtype of ``value``.
    """
    return _sampled(value, positions, "border")


def sample_with_zeros(value: Tensor, positions: Tensor) -> Tensor:
    """:func:`sample` of a map that goes on with zeros beyond its border."""
    return _sampled(value, positions, "zeros")


def _sampled(value: Tensor, positions: Tensor, padding: str) -> Tensor:
    # Positions in 16 bits would be off by whole pixels.
    dtype = torch.promote_types(value.dtype, torch.float32)
    size = positions.new_tensor([value.shape[3], value.shape[2]])
    grid = ((2 * positions + 1) / size - 1).to(dtype)
    found = F.grid_sample(
        value.to(dtype), grid, mode="bilinear", padding_mode=padding, align_corners=False
    )
    return found.to(value.dtype)
