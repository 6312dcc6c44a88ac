"""What operators that runtimes lack, or get wrong, amount to in slices, gathers and products.

While a module is recorded under :class:`PlainMode`, each call of the left is one of the right:

===============================  ==================================================
reassembly, similarity           products of whole cells' pixels, or gathers
``grid_sample``                  four gathers (TensorRT's own operator is off)
``unfold``                       slices
``adaptive_avg_pool2d``          products with matrices of shares
antialiased ``interpolate``      products with matrices of weights
``linalg.solve``                 elimination, written out
===============================  ==================================================

What depends on no input (plans of axes, matrices, positions) is computed while recording, and is a
constant of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from fmupsample.errors import UsageError
from fmupsample.ops.grid import cell_shares, interpolation_matrix, plan_axis

_RECORDED = (FakeTensor, FunctionalTensor, torch.SymInt, torch.SymFloat, torch.SymBool)


class PlainMode(TorchFunctionMode):
    """``with PlainMode(): module(...)`` inside what ``torch.export`` records."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(leaf, _RECORDED) for leaf in tree_leaves((args, kwargs))):
            with _disable_current_modes():
                return func(*args, **kwargs)
        with self:  # PyTorch takes a mode off while it handles a call
            plain = _PLAIN.get(func)
            if plain is not None:
                return plain(*args, **kwargs)
            if func is F.interpolate and kwargs.get("antialias"):
                return resize(*args, **kwargs)
        return func(*args, **kwargs)


def reassemble(value: Tensor, weights: Tensor, fractional: bool) -> Tensor:
    """:func:`fmupsample.ops.reassemble`.

    ``[B, V, h, w]`` and ``[B, K*K, H, W]`` -> ``[B, V, H, W]``.
    """
    ratio = _whole_ratio(value, weights)
    if ratio is None:
        return _reassemble_by_offset(value, weights, fractional)
    k, (h, w) = isqrt(weights.shape[1]), value.shape[2:]
    if fractional:
        weights, k = _on_whole_cells(weights, k, ratio), k + 2
    near = _neighbours(value.to(weights.dtype), k)  # [B, V, K*K, h, w]
    near = near.permute(0, 3, 4, 1, 2).flatten(0, 2)  # [B h w, V, K*K]
    out = torch.bmm(near, _by_cell(weights, ratio))  # [B h w, V, ry rx]
    return _by_pixel(out, (h, w), ratio).to(value.dtype)


def similarity(query: Tensor, key: Tensor, kernel_size: int, fractional: bool) -> Tensor:
    """:func:`fmupsample.ops.similarity` of whole cells.

    ``[B, E, H, W]`` and ``[B, E, h, w]`` -> ``[B, K*K, H, W]``.
    """
    if fractional:
        raise UsageError("similarity of bilinear samples cannot be exported; that of cells can")
    ratio = _whole_ratio(key, query)
    if ratio is None:
        down, across = (_cells_read(key, query, dim, kernel_size) for dim in (2, 3))
        rows = [key.index_select(2, y) for y in down]
        near = [row.index_select(3, x) for row in rows for x in across]
        return torch.stack([(query * cell).sum(1) for cell in near], 1)
    near = _neighbours(key, kernel_size).permute(0, 3, 4, 2, 1).flatten(0, 2)  # [B h w, K*K, E]
    return _by_pixel(torch.bmm(near, _by_cell(query, ratio)), key.shape[2:], ratio)


def grid_sample(
    value: Tensor,
    grid: Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> Tensor:
    """Bilinear ``F.grid_sample``: ``[B, V, h, w]`` at ``[B, H, W, 2]`` -> ``[B, V, H, W]``."""
    if mode != "bilinear" or align_corners or padding_mode not in ("zeros", "border"):
        raise UsageError(f"grid_sample with {mode}, {padding_mode} padding cannot be exported")
    batch, _, h, w = value.shape
    size = grid.shape[1:3]
    axes = []
    for at, n in ((grid[..., 1], h), (grid[..., 0], w)):
        place = ((at + 1) * n - 1) / 2
        if padding_mode == "border":
            place = place.clamp(0, n - 1)
        base = place.floor()
        low, share = base.to(torch.int64), place - base
        axes.append([_tap(low, 1 - share, n), _tap(low + 1, share, n)])
    table = value.flatten(2).transpose(1, 2).flatten(0, 1)  # [B h w, V]
    first = (torch.arange(batch, device=value.device) * (h * w))[:, None, None]
    total = None
    for row, row_share in axes[0]:
        for column, share in axes[1]:
            cells = (first + row * w + column).flatten()
            part = table.index_select(0, cells) * (row_share * share).flatten()[:, None]
            total = part if total is None else total + part
    return total.unflatten(0, (batch, size[0] * size[1])).transpose(1, 2).unflatten(2, size)


def unfold(x: Tensor, kernel_size: int, **_: Any) -> Tensor:
    """``F.unfold`` of every K x K window: ``[B, E, h, w]`` -> ``[B, E*K*K, (h-K+1)*(w-K+1)]``."""
    return _windows(x, kernel_size).flatten(1, 2).flatten(2)


def pool(x: Tensor, output_size: tuple[int, int]) -> Tensor:
    """``F.adaptive_avg_pool2d``: ``[B, C, H, W]`` -> ``[B, C, h, w]``."""
    ratio = _whole_ratio(None, x, tuple(output_size))
    if ratio is not None:
        h, w = output_size
        return x.unflatten(3, (w, ratio[1])).unflatten(2, (h, ratio[0])).mean((3, 5))
    down, across = (
        cell_shares(n, pixels, slice(0, n), slice(0, pixels)).to(x.dtype)
        for n, pixels in zip(output_size, x.shape[2:], strict=True)
    )
    return down @ (x @ across.T)


def resize(x: Tensor, size: tuple[int, int], mode: str, antialias: bool, **options: Any) -> Tensor:
    """Antialiased ``F.interpolate``, which treats rows and columns alike and apart."""
    down, across = (
        F.interpolate(torch.eye(n)[None, None], (m, n), mode=mode, antialias=antialias, **options)[
            0, 0
        ].to(x.dtype)
        for n, m in zip(x.shape[2:], size, strict=True)
    )  # [m, n]
    return down @ x @ across.T


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """``torch.linalg.solve`` of positive definite ``[..., G, G]`` and ``[..., G, V]``."""
    count = matrix.shape[-1]
    rows = [matrix[..., i : i + 1, :] for i in range(count)]
    wanted = [right[..., i : i + 1, :] for i in range(count)]
    for i in range(count):
        for j in range(i + 1, count):
            factor = rows[j][..., i : i + 1] / rows[i][..., i : i + 1]
            rows[j] = rows[j] - factor * rows[i]
            wanted[j] = wanted[j] - factor * wanted[i]
    for i in reversed(range(count)):
        for j in range(i + 1, count):
            wanted[i] = wanted[i] - rows[i][..., j : j + 1] * wanted[j]
        wanted[i] = wanted[i] / rows[i][..., i : i + 1]
    return torch.cat(wanted, -2)


_PLAIN: dict[Any, Callable] = {
    torch.ops.fmupsample.reassemble: reassemble,
    torch.ops.fmupsample.reassemble.default: reassemble,
    torch.ops.fmupsample.reassemble_grad_weights: similarity,
    torch.ops.fmupsample.reassemble_grad_weights.default: similarity,
    F.grid_sample: grid_sample,
    F.unfold: unfold,
    F.adaptive_avg_pool2d: pool,
    torch.linalg.solve: solve,
}


def _whole_ratio(
    low: Tensor | None, high: Tensor, cells: tuple[int, int] | None = None
) -> tuple[int, int] | None:
    """Pixels per cell along both axes, where that is a whole number."""
    cells = tuple(low.shape[2:]) if cells is None else cells
    sizes = list(zip(high.shape[2:], cells, strict=True))
    return None if any(n % m for n, m in sizes) else tuple(n // m for n, m in sizes)


def _neighbours(x: Tensor, k: int) -> Tensor:
    """K x K cells around each cell, ``[B, E, h, w]`` -> ``[B, E, K*K, h, w]``.

    Beyond the border they are the border's.
    """
    return _windows(F.pad(x, (k // 2,) * 4, mode="replicate"), k)


def _windows(x: Tensor, k: int) -> Tensor:
    """``[B, E, h, w]`` -> ``[B, E, K*K, h - K + 1, w - K + 1]``."""
    h, w = (n - k + 1 for n in x.shape[2:])
    return torch.stack([x[..., i : i + h, j : j + w] for i in range(k) for j in range(k)], 2)


def _by_cell(x: Tensor, ratio: tuple[int, int]) -> Tensor:
    """``[B, N, H, W]`` -> ``[B h w, N, ry rx]``."""
    (ry, rx), (height, width) = ratio, x.shape[2:]
    parts = x.unflatten(3, (width // rx, rx)).unflatten(2, (height // ry, ry))
    return parts.permute(0, 2, 4, 1, 3, 5).flatten(4).flatten(0, 2)


def _by_pixel(x: Tensor, cells: tuple[int, int], ratio: tuple[int, int]) -> Tensor:
    """``[B h w, N, ry rx]`` -> ``[B, N, H, W]``."""
    grid = x.unflatten(2, ratio).unflatten(0, (-1, *cells))  # [B, h, w, N, ry, rx]
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def _on_whole_cells(weights: Tensor, k: int, ratio: tuple[int, int]) -> Tensor:
    """Weights ``[B, K*K, H, W]`` of bilinear samples -> ``[B, (K+2)^2, H, W]`` of whole cells.

    The cells are those around the pixel's own. What a pixel's samples read depends on where in its
    cell it lies, and on nothing else.
    """
    (ry, rx), (height, width) = ratio, weights.shape[2:]
    down, across = (_spread(k, r).to(weights.dtype) for r in ratio)  # [r, K + 2, K]
    grid = weights.view(-1, k, k, height // ry, ry, width // rx, rx)
    grid = grid.permute(0, 3, 5, 4, 6, 1, 2)  # [B, h, w, ry, rx, K, K]
    grid = down[:, None] @ grid @ across.transpose(1, 2)
    return grid.permute(0, 5, 6, 1, 3, 2, 4).reshape(-1, (k + 2) ** 2, height, width)


def _spread(k: int, ratio: int) -> Tensor:
    """Shares of cells -K/2 - 1 .. K/2 + 1 in the samples of a pixel, ``[ratio, K + 2, K]``."""
    # A cell with one neighbour on each side: the middle rows of an interpolation matrix.
    shares = interpolation_matrix(3, 3 * ratio)[ratio : 2 * ratio]  # [ratio, 3]
    return torch.stack([F.pad(shares, (i, k - 1 - i)) for i in range(k)], 2)


def _reassemble_by_offset(value: Tensor, weights: Tensor, fractional: bool) -> Tensor:
    """Any ratio: one neighbour after another, which moves the map through memory for each."""
    k = isqrt(weights.shape[1])
    axes = []
    for dim in (2, 3):
        matrices = _samples(value, weights, dim, k, fractional)
        axes.append([matrix.to(value.dtype) for matrix in matrices])
    total = None
    for i, down in enumerate(axes[0]):
        rows = down @ value
        for j, across in enumerate(axes[1]):
            part = (rows @ across.T) * weights[:, i * k + j, None].to(value.dtype)
            total = part if total is None else total + part
    return total


def _samples(value: Tensor, weights: Tensor, dim: int, k: int, fractional: bool) -> list[Tensor]:
    """For each of K offsets the matrix ``[pixels, cells]`` that takes its samples along an axis."""
    cells, pixels = value.shape[dim], weights.shape[dim]
    plan, reach = plan_axis(cells, pixels, fractional), k // 2
    matrices = []
    for offset in range(-reach, reach + 1):
        matrix = torch.zeros(pixels, cells, dtype=torch.float64)
        for tap, share in ((0, 1 - plan.fraction), (1, plan.fraction)):
            cell = (plan.base + offset + tap).clamp(0, cells - 1)
            matrix.index_put_((torch.arange(pixels), cell), share, accumulate=True)
        matrices.append(matrix)
    return matrices


def _cells_read(low: Tensor, high: Tensor, dim: int, k: int) -> list[Tensor]:
    """For each of K offsets the cell that each pixel of an axis reads."""
    cells, reach = low.shape[dim], k // 2
    base = plan_axis(cells, high.shape[dim], False).base
    return [(base + offset).clamp(0, cells - 1) for offset in range(-reach, reach + 1)]


def _tap(cell: Tensor, share: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """A cell to read and its share, which is 0 outside the map."""
    inside = cell.clamp(0, cells - 1)
    return inside, share * (inside == cell)
