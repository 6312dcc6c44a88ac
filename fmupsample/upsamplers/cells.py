"""Scores of whole cells: products of pixels' queries with the keys of the cells around them."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from fmupsample.ops.grid import base_cell, base_cells

Window = tuple[slice, slice]  # rows and columns of a map
WHOLE: Window = (slice(None), slice(None))
_BAND = 2**18  # numbers of a band of queries: a megabyte


def cell_products(
    query: Tensor,
    key: Tensor,
    offset: Tensor,
    kernel_size: int,
    size: tuple[int, int],
    window: Window = WHOLE,
    onto: Tensor | None = None,
) -> Tensor:
    """``query(p) . key(c) + offset(c)`` for the K x K cells c around the one that pixel p lies in.

    Cells outside the map are the nearest inside.

    Args:
        query: ``[B, E, rows, columns]`` of the window.
        key: ``[B, E, h, w]``; offset: ``[B, 1, h, w]``.
        size: ``(H, W)`` of the whole map.
        onto: what it is added to, in place.

    Returns:
        ``[B, K*K, rows, columns]``.
    """
    near = near_cells(torch.cat([key, offset], 1), kernel_size, size, window)
    cells = (key.shape[-2], key.shape[-1])
    return near_products(query, near, kernel_size, cells, size, window, onto)


def near_cells(x: Tensor, kernel_size: int, size: tuple[int, int], window: Window) -> Tensor:
    """Of all cells ``[B, E, h, w]`` those that some pixel of the window has for a neighbour.

    The ones around the map, as far as they count, are the nearest inside.
    """
    reach, pad = kernel_size // 2, []
    if window == WHOLE:
        return F.pad(x, (reach,) * 4, mode="replicate")
    for dim, (pixels, part) in enumerate(zip(size, window, strict=True), -2):
        cells, (start, stop, _) = x.shape[dim], part.indices(pixels)
        first = base_cell(start, cells, pixels, False) - reach
        last = base_cell(stop - 1, cells, pixels, False) + reach + 1
        inside = max(0, first), min(x.shape[dim], last)
        pad = [inside[0] - first, last - inside[1], *pad]
        x = x.narrow(dim, inside[0], inside[1] - inside[0])
    return F.pad(x, pad, mode="replicate")


def near_products(
    query: Tensor,
    near: Tensor,
    kernel_size: int,
    cells: tuple[int, int],
    size: tuple[int, int],
    window: Window,
    onto: Tensor | None = None,
) -> Tensor:
    """:func:`cell_products` of :func:`near_cells` of keys and offsets ``[B, E + 1, ...]``."""
    whole = tuple(query.shape[-2:]) == tuple(size)
    if not whole or any(n % m for n, m in zip(size, cells, strict=True)):
        rows, columns = _in_near_cells(cells, size, window)
        by_pixel = _by_neighbour if torch.compiler.is_compiling() else _by_row
        found = by_pixel(query, near, kernel_size, rows, columns)
    elif _in_bands(query, near, onto):
        return _by_band(query, near, kernel_size, cells, onto)
    else:
        found = _by_cell(query, near, kernel_size, cells)
    return found if onto is None else onto.add_(found)


def _in_bands(query: Tensor, *others: Tensor | None) -> bool:
    """Whether the cache of a processor decides the time, and nobody asks for gradients."""
    learning = any(x is not None and x.requires_grad for x in (query, *others))
    learning = learning and torch.is_grad_enabled()
    return query.device.type == "cpu" and not learning and not torch.compiler.is_compiling()


def _by_band(
    query: Tensor,
    padded: Tensor,
    kernel_size: int,
    cells: tuple[int, int],
    onto: Tensor | None,
) -> Tensor:
    """:func:`_by_cell`, some rows of cells at a time: pixels in the order of their cells and their
    products never leave the processor's cache."""
    (batch, embedding, height, width), (h, w) = query.shape, cells
    out = query.new_empty(batch, kernel_size**2, height, width) if onto is None else onto
    rows = max(1, _BAND // (embedding * width * (height // h)))  # of cells
    for one, near, result in zip(query, padded, out, strict=True):
        for first in range(0, h, rows):
            last = min(first + rows, h)
            part = slice(first * height // h, last * height // h)
            found = _by_cell(
                one[None, :, part],
                near[None, :, first : last + kernel_size - 1],
                kernel_size,
                (last - first, w),
            )[0]
            if onto is None:
                result[:, part] = found
            else:
                result[:, part] += found
    return out


def _by_cell(query: Tensor, padded: Tensor, kernel_size: int, cells: tuple[int, int]) -> Tensor:
    """Whole ratios: the pixels of a cell have the same neighbours, one product each."""
    (batch, embedding), (h, w) = query.shape[:2], cells
    sy, sx = (n // m for n, m in zip(query.shape[-2:], cells, strict=True))
    near = F.unfold(padded, kernel_size).unflatten(1, (embedding + 1, -1))  # [B, E + 1, K*K, h w]
    near = near.permute(0, 3, 2, 1).flatten(0, 1)  # [B h w, K*K, E + 1]
    pixels = query.unflatten(3, (w, sx)).unflatten(2, (h, sy))  # [B, E, h, sy, w, sx]
    pixels = pixels.permute(0, 2, 4, 1, 3, 5).reshape(-1, embedding, sy * sx)
    found = torch.baddbmm(near[:, :, -1:], near[:, :, :-1].contiguous(), pixels)
    found = found.view(batch, h, w, -1, sy, sx).permute(0, 3, 1, 4, 2, 5)
    return found.reshape(batch, -1, h * sy, w * sx)


def _by_row(
    query: Tensor, padded: Tensor, kernel_size: int, rows: Tensor, columns: Tensor
) -> Tensor:
    """Any ratio: the pixels of a column in a row of cells have, one product each."""
    across = (columns + torch.arange(kernel_size)[:, None]).to(query.device)  # [K, W], padded
    cuts = [0, *(torch.diff(rows).nonzero().flatten() + 1).tolist(), len(rows)]
    bands = []
    for first, last in pairwise(cuts):
        base = int(rows[first])
        near = padded[:, :, base : base + kernel_size, across]  # [B, E + 1, K, K, W]
        offset = near[:, -1].flatten(1, 2)[:, :, None]  # [B, K*K, 1, W]
        near = near[:, :-1].permute(0, 4, 2, 3, 1).flatten(2, 3).flatten(0, 1)  # [B W, K*K, E]
        pixels = query[:, :, first:last].permute(0, 3, 1, 2).flatten(0, 1)  # [B W, E, rows]
        found = torch.bmm(near.contiguous(), pixels.contiguous()).unflatten(0, (len(query), -1))
        bands.append(found.permute(0, 2, 3, 1) + offset)
    return torch.cat(bands, 2)


def _by_neighbour(
    query: Tensor, padded: Tensor, kernel_size: int, rows: Tensor, columns: Tensor
) -> Tensor:
    """Any ratio, sizes that may be symbols: the compiler makes one loop of it."""
    rows, columns = rows.to(query.device), columns.to(query.device)
    found = []
    for i in range(kernel_size):
        band = padded.index_select(2, rows + i)
        for j in range(kernel_size):
            near = band.index_select(3, columns + j)  # [B, E + 1, H, W]
            found.append((query * near[:, :-1]).sum(1) + near[:, -1])
    return torch.stack(found, 1)


def _in_near_cells(
    cells: tuple[int, int], size: tuple[int, int], window: Window
) -> tuple[Tensor, Tensor]:
    """For each row and column of the window, the first of its K cells in :func:`near_cells`."""
    found = []
    for n, pixels, part in zip(cells, size, window, strict=True):
        first = base_cell(part.indices(pixels)[0], n, pixels, False)
        found.append(base_cells(n, pixels, False)[part] - first)
    return found[0], found[1]
