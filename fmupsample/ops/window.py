"""Operators on a rectangle of a map: what the rectangle costs, not what the map costs.

They give the numbers of the whole map up to rounding, without gradients, in plain PyTorch on every
device. A rectangle that is the whole map goes to the operators themselves, which have gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmupsample.errors import ShapeError
from fmupsample.ops.grid import AxisPlan, plan_axis
from fmupsample.ops.plain import grouped
from fmupsample.ops.reassembly import check_kernels, check_similarity, reassemble, similarity


def reassemble_window(
    value: Tensor,
    weights: Tensor,
    size: tuple[int, int],
    corner: tuple[int, int] = (0, 0),
    *,
    fractional: bool = True,
) -> Tensor:
    """A rectangle of :func:`fmupsample.ops.reassemble`, read from no more cells than it needs.

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
    if tuple(weights.shape[2:]) == tuple(size) and tuple(corner) == (0, 0):
        return reassemble(value, weights, fractional=fractional)
    check_kernels("reassemble_window", value, weights)
    axes = _axes(value, weights, size, corner, fractional)
    with torch.no_grad():
        return grouped.reassemble(value, weights, fractional, axes)


def similarity_window(
    query: Tensor,
    key: Tensor,
    kernel_size: int,
    size: tuple[int, int],
    corner: tuple[int, int] = (0, 0),
    *,
    fractional: bool = True,
) -> Tensor:
    """A rectangle of :func:`fmupsample.ops.similarity`.

    Args:
        query: ``[B, E, H', W']``, of the rectangle's pixels.
        key: ``[B, E, h, w]``, of the whole map.
        kernel_size: K, odd.
        size, corner, fractional: as in :func:`reassemble_window`.

    Returns:
        ``[B, K*K, H', W']``, in at least float32.

    Raises:
        ShapeError: the shapes do not fit, or the rectangle leaves the map.
    """
    if tuple(query.shape[2:]) == tuple(size) and tuple(corner) == (0, 0):
        return similarity(query, key, kernel_size, fractional=fractional)
    check_similarity("similarity_window", query, key, kernel_size)
    axes = _axes(key, query, size, corner, fractional)
    with torch.no_grad():
        return grouped.grad_weights(query, key, kernel_size, fractional, axes)


def _axes(
    low: Tensor, part: Tensor, size: tuple[int, int], corner: tuple[int, int], fractional: bool
) -> tuple[AxisPlan, AxisPlan]:
    """The plans of the rectangle's rows and columns."""
    axes = []
    for cells, pixels, first, length in zip(
        low.shape[2:], size, corner, part.shape[2:], strict=True
    ):
        if first < 0 or first + length > pixels or pixels < cells:
            raise ShapeError(
                f"a rectangle of {list(part.shape[2:])} pixels at {list(corner)} is no part of "
                f"a map of {list(size)} pixels on {list(low.shape[2:])} cells"
            )
        axes.append(plan_axis(cells, pixels, fractional).part(first, first + length))
    return axes[0], axes[1]
