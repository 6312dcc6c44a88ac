"""What operators that runtimes lack, or get wrong, amount to in slices, gathers and products.

While a module is recorded under :class:`PlainMode`, each call of the left is one of the right:

===============================  ==================================================
reassembly, similarity           products of whole cells' pixels
``grid_sample``                  four gathers (TensorRT's own operator is off)
``adaptive_avg_pool2d``          means of whole cells' pixels
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
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from fmupsample.errors import UsageError
from fmupsample.ops.grid import interpolation_matrix

_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


class PlainMode(TorchFunctionMode):
    """``with PlainMode(): module(...)`` inside what ``torch.export`` records."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _recorded((args, kwargs)):
            # A constant. PyTorch has no public way to compute one while it records.
            with _disable_current_modes():
                return func(*args, **kwargs)
        with self:  # PyTorch takes a mode off while it handles a call
            plain = _PLAIN.get(func)
            if plain is not None:
                return plain(*args, **kwargs)
            if func is F.interpolate and kwargs.get("antialias"):
                return resize(*args, **kwargs)
        return func(*args, **kwargs)


def _recorded(given: Any) -> bool:
    """Whether what a call is given holds something that the recorder made of an input."""
    if isinstance(given, Tensor):
        return type(given) not in (Tensor, nn.Parameter)
    if isinstance(given, dict):
        given = tuple(given.values())
    if isinstance(given, (tuple, list)):
        return any(map(_recorded, given))
    return isinstance(given, _SYMBOLS)


def reassemble(value: Tensor, weights: Tensor, fractional: bool) -> Tensor:
    """:func:`fmupsample.ops.reassemble`.

    ``[B, V, h, w]`` and ``[B, K*K, H, W]`` -> ``[B, V, H, W]``.
    """
    ratio, k = _ratio(value.shape[2:], weights), isqrt(weights.shape[1])
    if fractional:
        weights, k = _on_whole_cells(weights, k, ratio), k + 2
    near = _neighbours(value.to(weights.dtype), k)  # [B, V, K*K, h, w]
    near = near.permute(0, 3, 4, 1, 2).flatten(0, 2)  # [B h w, V, K*K]
    out = torch.bmm(near, _by_cell(weights, ratio))  # [B h w, V, ry rx]
    return _by_pixel(out, value.shape[2:], ratio).to(value.dtype)


def similarity(query: Tensor, key: Tensor, kernel_size: int, fractional: bool) -> Tensor:
    """:func:`fmupsample.ops.similarity` of whole cells.

    ``[B, E, H, W]`` and ``[B, E, h, w]`` -> ``[B, K*K, H, W]``.
    """
    if fractional:
        raise UsageError("similarity of bilinear samples cannot be exported; that of cells can")
    ratio = _ratio(key.shape[2:], query)
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


def pool(x: Tensor, output_size: tuple[int, int]) -> Tensor:
    """``F.adaptive_avg_pool2d``: ``[B, C, H, W]`` -> ``[B, C, h, w]``."""
    (ry, rx), (h, w) = _ratio(output_size, x), output_size
    return x.unflatten(3, (w, rx)).unflatten(2, (h, ry)).mean((3, 5))


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
    F.adaptive_avg_pool2d: pool,
    torch.linalg.solve: solve,
}


def _ratio(cells: tuple[int, int], x: Tensor) -> tuple[int, int]:
    """Pixels of ``x`` per cell, down and across: whole, since sizes are multiples of a stride."""
    sizes = list(zip(x.shape[2:], cells, strict=True))
    if any(n % m for n, m in sizes):
        raise UsageError(
            f"{list(x.shape[2:])} pixels on {list(cells)} cells cannot be exported: a size must be "
            "a multiple of the number of cells"
        )
    return tuple(n // m for n, m in sizes)


def _neighbours(x: Tensor, k: int) -> Tensor:
    """K x K cells around each cell, ``[B, E, h, w]`` -> ``[B, E, K*K, h, w]``.

    Beyond the border they are the border's.
    """
    (h, w), x = x.shape[2:], F.pad(x, (k // 2,) * 4, mode="replicate")
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


def _tap(cell: Tensor, share: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """A cell to read and its share, which is 0 outside the map."""
    inside = cell.clamp(0, cells - 1)
    return inside, share * (inside == cell)
