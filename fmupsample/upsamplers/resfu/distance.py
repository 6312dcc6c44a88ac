"""Scores of whole cells by distance: how a pixel's query differs from what a cell is.

Scores of paired differences belong to an offset: where a pixel's own cell ends, the cell that was
to the right becomes the one in the middle, and its score is another. Where neighbours are whole
cells, that shows as a mosaic. A distance belongs to the cell itself: its score goes on across the
border, and with weights that end at nothing where a cell leaves the neighbourhood (``taper``) the
result is continuous.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.layers.moments import group_moments
from fmupsample.ops.grid import plan_axis

Window = tuple[slice, slice]
WHOLE: Window = (slice(None), slice(None))
# Scores are means over the channels times this: of a size that training reaches in some dozens of
# steps.
_GAIN = 8.0
_BAND = 2**18  # numbers of a band of queries: a megabyte


class CellDistance(nn.Module):
    """``-8 mean_e w_e (q_e - k_e)^2`` of normalised queries and keys, up to what is the same for
    all neighbours of a pixel. ``w`` begins at 0.

    Args:
        embedding: E; norm_groups: of the normalisation, which has no parameters.
        shared: one weight for all channels, for keys whose channels mean nothing.
    """

    def __init__(self, embedding: int, norm_groups: int, kernel_size: int, *, shared: bool) -> None:
        super().__init__()
        self.norm_groups, self.kernel_size = norm_groups, kernel_size
        self.weight = nn.Parameter(torch.zeros(1 if shared else embedding))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        size: tuple[int, int],
        window: Window = WHOLE,
        moments: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Scores ``[B, K*K, rows, columns]`` of the window.

        Args:
            query: ``[B, E, rows, columns]`` of the window; key: ``[B, E, h, w]`` of all cells.
            size: ``(H, W)`` of the whole map.
            moments: of the queries of the whole map, where this is a window.
        """
        cells = (key.shape[-2], key.shape[-1])
        mean, gain = self._normalisation(query, moments)
        key_mean, key_gain = self._normalisation(key)
        key = (_near_cells(key, self.kernel_size, size, window) - key_mean) * key_gain
        # The query's normalisation is folded into the keys, which are few.
        weighted = key * (self.weight.to(key)[:, None, None] * _GAIN / key.shape[1])
        offset = -(weighted * (key + 2 * mean * gain)).sum(1, keepdim=True)
        near = torch.cat([2 * weighted * gain, offset], 1)
        return _products(query, near, self.kernel_size, cells, size, window)

    def _normalisation(
        self, x: Tensor, moments: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """What to subtract and then to multiply by, ``[B, E, 1, 1]`` each."""
        mean, variance = group_moments(x, self.norm_groups) if moments is None else moments
        each = x.shape[1] // self.norm_groups
        return tuple(
            part.repeat_interleave(each, 1)[:, :, None, None]
            for part in (mean, (variance + 1e-5).rsqrt())
        )


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
    near = _near_cells(torch.cat([key, offset], 1), kernel_size, size, window)
    cells = (key.shape[-2], key.shape[-1])
    return _products(query, near, kernel_size, cells, size, window, onto)


def _near_cells(x: Tensor, kernel_size: int, size: tuple[int, int], window: Window) -> Tensor:
    """Of all cells ``[B, E, h, w]`` those that some pixel of the window has for a neighbour.

    The ones around the map, as far as they count, are the nearest inside.
    """
    reach, pad = kernel_size // 2, []
    if window == WHOLE:
        return F.pad(x, (reach,) * 4, mode="replicate")
    for dim, (pixels, part) in enumerate(zip(size, window, strict=True), -2):
        own = plan_axis(x.shape[dim], pixels, False).base[part]
        first, last = int(own[0]) - reach, int(own[-1]) + reach + 1
        inside = max(0, first), min(x.shape[dim], last)
        pad = [inside[0] - first, last - inside[1], *pad]
        x = x.narrow(dim, inside[0], inside[1] - inside[0])
    return F.pad(x, pad, mode="replicate")


def _products(
    query: Tensor,
    near: Tensor,
    kernel_size: int,
    cells: tuple[int, int],
    size: tuple[int, int],
    window: Window,
    onto: Tensor | None = None,
) -> Tensor:
    """:func:`cell_products` of :func:`_near_cells` of keys and offsets ``[B, E + 1, ...]``."""
    whole = tuple(query.shape[-2:]) == tuple(size)
    if not whole or any(n % m for n, m in zip(size, cells, strict=True)):
        found = _by_row(query, near, kernel_size, cells, size, window)
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
    query: Tensor,
    padded: Tensor,
    kernel_size: int,
    cells: tuple[int, int],
    size: tuple[int, int],
    window: Window,
) -> Tensor:
    """Any ratio: the pixels of a column in a row of cells have, one product each."""
    bases = (
        plan_axis(n, pixels, False).base[part]
        for n, pixels, part in zip(cells, size, window, strict=True)
    )
    rows, columns = (base - base[0] for base in bases)  # in the padded part
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
