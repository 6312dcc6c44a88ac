"""Reassembly of a rectangle of a map: what the rectangle costs, not what the map costs."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from fmupsample.errors import ShapeError
from fmupsample.ops.plain import grouped
from fmupsample.ops.reassembly import reassemble


@torch.no_grad()
def reassemble_window(
    value: Tensor,
    weights: Tensor,
    size: tuple[int, int],
    corner: tuple[int, int] = (0, 0),
    *,
    fractional: bool = True,
) -> Tensor:
    """A rectangle of :func:`fmupsample.ops.reassemble`, read from no more cells than it needs.

    The same numbers up to rounding; without gradients, and in plain PyTorch on every device (a
    rectangle that is the whole map goes to :func:`~fmupsample.ops.reassemble`).

    Args:
        value: ``[B, V, h, w]``, the whole value map.
        weights: ``[B, K*K, H', W']``, of the rectangle's pixels.
        size: ``(H, W)`` of the whole map.
        corner: row and column of the rectangle's first pixel.
        fractional: bilinear samples or whole cells.

    Returns:
        ``[B, V, H', W']`` in the dtype of ``value``.

    Raises:
        ShapeError: the shapes do not fit, or the rectangle leaves the map.
    """
    if tuple(weights.shape[2:]) == tuple(size) and corner == (0, 0):
        return reassemble(value, weights, fractional=fractional)
    if value.ndim != 4 or weights.ndim != 4 or value.shape[0] != weights.shape[0]:
        raise ShapeError(
            "reassemble_window needs value [B, V, h, w] and weights [B, K*K, H', W'] of one "
            f"batch, got {list(value.shape)} and {list(weights.shape)}"
        )
    k = isqrt(weights.shape[1])
    if k * k != weights.shape[1] or k % 2 == 0:
        raise ShapeError(
            f"reassemble_window needs an odd square number of weights, got {weights.shape[1]}"
        )
    for first, length, pixels, cells in zip(
        corner, weights.shape[2:], size, value.shape[2:], strict=True
    ):
        if first < 0 or first + length > pixels or pixels < cells:
            raise ShapeError(
                f"a rectangle of {list(weights.shape[2:])} pixels at {list(corner)} is no part of "
                f"a map of {list(size)} pixels on {list(value.shape[2:])} cells"
            )
    return grouped.reassemble_window(value, weights, size, corner, fractional)
