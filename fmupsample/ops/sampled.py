"""Reassembly at chosen pixels: what a random sample of a map costs, not what the map costs.

A pixel is a weighted sum of a few cells, so n pixels are a sparse matrix with n rows times the
value map. Fractional neighbours share their fraction, so K x K of them touch (K+1) x (K+1) cells.
"""

from __future__ import annotations

from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from fmupsample.errors import ShapeError
from fmupsample.ops.grid import AxisPlan, plan_axis


def reassemble_at(
    value: Tensor, weights: Tensor, pixels: Tensor, *, fractional: bool = True
) -> Tensor:
    """Some pixels of :func:`fmupsample.ops.reassemble`, for one picture.

    Args:
        value: ``[V, h, w]``, float32 or float64. Gradients go to it.
        weights: ``[K*K, H, W]``, K odd, any floating dtype. They get no gradient.
        pixels: int64 ``[n]``, ``row * W + column`` of each; may repeat.
        fractional: bilinear samples (ReSFU, bilinear) or whole cells (JBU, nearest).

    Returns:
        ``[n, V]`` in the dtype of ``value``.

    Raises:
        ShapeError: the shapes do not fit.
    """
    if value.ndim != 3 or weights.ndim != 3 or pixels.ndim != 1:
        raise ShapeError(
            "reassemble_at needs value [V, h, w], weights [K*K, H, W] and pixels [n], got "
            f"{list(value.shape)}, {list(weights.shape)} and {list(pixels.shape)}"
        )
    k = isqrt(weights.shape[0])
    if k * k != weights.shape[0] or k % 2 == 0:
        raise ShapeError(
            f"reassemble_at needs an odd square number of weights, got {weights.shape[0]}"
        )
    (h, w), (height, width) = value.shape[1:], weights.shape[1:]
    if height < h or width < w:
        raise ShapeError(
            f"weights {list(weights.shape)} are smaller than the value map {list(value.shape)}"
        )
    shares = weights.detach().flatten(1)[:, pixels].to(value.dtype)  # [K*K, n]
    rows, columns = pixels // width, pixels % width
    return reassemble_points(value, shares, rows, columns, (height, width), fractional=fractional)


def reassemble_points(
    value: Tensor,
    shares: Tensor,
    rows: Tensor,
    columns: Tensor,
    size: tuple[int, int],
    *,
    fractional: bool = True,
) -> Tensor:
    """:func:`reassemble_at` for weights that have been looked up.

    Args:
        value: ``[V, h, w]``, float32 or float64. Gradients go to it.
        shares: ``[K*K, n]``, the weights of each pixel, in the dtype of ``value``.
        rows, columns: int64 ``[n]``, the pixels.
        size: ``(H, W)`` of the whole map.

    Returns:
        ``[n, V]``.
    """
    k, (h, w) = isqrt(shares.shape[0]), value.shape[1:]
    down, across = plan_axis(h, size[0], fractional), plan_axis(w, size[1], fractional)
    if fractional:
        shares = _merged(
            shares.unflatten(0, (k, k)), _of(down.fraction, rows), _of(across.fraction, columns)
        )
    taps = k + int(fractional)
    y, x = _cells(down, rows, k, taps), _cells(across, columns, k, taps)
    cells = y[:, :, None] * w + x[:, None, :]  # [n, taps, taps]
    table = value.flatten(1).T.contiguous()  # [h*w, V]
    return _WeightedRows.apply(table, cells.flatten(1), shares.flatten(0, -2).T.contiguous())


def _of(plan: Tensor, index: Tensor) -> Tensor:
    return plan.to(index.device)[index]


def _merged(shares: Tensor, fy: Tensor, fx: Tensor) -> Tensor:
    """Weights ``[K, K, n]`` on bilinear samples -> ``[K+1, K+1, n]`` on whole cells."""
    fy, fx = fy.to(shares.dtype), fx.to(shares.dtype)
    down = F.pad(shares * (1 - fy), (0, 0, 0, 0, 0, 1))
    down[1:] += shares * fy
    both = F.pad(down * (1 - fx), (0, 0, 0, 1))
    both[:, 1:] += down * fx
    return both


def _cells(axis: AxisPlan, pixels: Tensor, k: int, taps: int) -> Tensor:
    """The cells of one axis that each pixel reads, int64 ``[n, taps]``, clamped to the map."""
    offsets = torch.arange(taps, device=pixels.device) - k // 2
    return (_of(axis.base, pixels)[:, None] + offsets).clamp(0, axis.cells - 1)


class _WeightedRows(torch.autograd.Function):
    """``out[n] = sum_t shares[n, t] * table[cells[n, t]]``, with a backward for few rows.

    ``embedding_bag`` alone would do, but its own backward takes five times as long.
    """

    @staticmethod
    def forward(ctx, table: Tensor, cells: Tensor, shares: Tensor) -> Tensor:
        ctx.save_for_backward(cells, shares)
        ctx.rows = len(table)
        return F.embedding_bag(cells, table, per_sample_weights=shares, mode="sum")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        cells, shares = ctx.saved_tensors
        samples, taps = cells.shape
        rows = torch.arange(samples, device=cells.device).repeat_interleave(taps)
        transposed = torch.sparse_coo_tensor(
            torch.stack([cells.flatten(), rows]),
            shares.flatten(),
            (ctx.rows, samples),
            check_invariants=False,
        )
        return transposed @ grad, None, None
