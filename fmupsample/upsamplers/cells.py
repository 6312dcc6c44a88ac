"""Scores of whole cells: products of pixels' queries with the keys of the cells around them."""

from __future__ import annotations

import torch
from torch import Tensor

from fmupsample.ops import similarity_window

Window = tuple[slice, slice]  # rows and columns of a map
WHOLE: Window = (slice(None), slice(None))


def cell_products(
    query: Tensor,
    key: Tensor,
    offset: Tensor,
    kernel_size: int,
    size: tuple[int, int],
    window: Window = WHOLE,
) -> Tensor:
    """``query(p) . key(c) + offset(c)`` for the K x K cells c around the one that pixel p lies in.

    Cells outside the map are the nearest inside. Windows give no gradients.

    Args:
        query: ``[B, E, rows, columns]`` of the window.
        key: ``[B, E, h, w]``; offset: ``[B, 1, h, w]``.
        size: ``(H, W)`` of the whole map.

    Returns:
        ``[B, K*K, rows, columns]``.
    """
    one = query.new_ones(()).expand(query.shape[0], 1, *query.shape[2:])
    query, key = torch.cat([query, one], 1), torch.cat([key, offset], 1)
    corner = (window[0].start or 0, window[1].start or 0)
    return similarity_window(query, key, kernel_size, size, corner, fractional=False)
