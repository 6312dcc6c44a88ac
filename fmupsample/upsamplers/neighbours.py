"""K x K whole cells around a pixel: which of them exist, and weights made of their scores.

Official implementations pad with zeros: a neighbour outside the map has score 0, takes its share of
the softmax, and adds nothing, so that features fade towards the border. Here such neighbours are
left out by default (``"masked"``), and the official way is to be had (``"zeros"``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fmupsample.ops.grid import base_cells, cell_inside

BORDERS = ("masked", "zeros")


def outside(
    cells: tuple[int, int], pixels: tuple[int, int], kernel_size: int, device: torch.device
) -> Tensor:
    """Bool ``[K*K, H, W]``: neighbours that lie outside a map of ``cells``, row-major."""
    reach = kernel_size // 2
    rows, columns = (
        torch.stack([~cell_inside(n, m, d) for d in range(-reach, reach + 1)]).to(device)
        for n, m in zip(cells, pixels, strict=True)
    )  # [K, H], [K, W]
    return (rows[:, None, :, None] | columns[None, :, None, :]).flatten(0, 1)


def neighbour_softmax(
    scores: Tensor, cells: tuple[int, int], border: str, *, zero_score: bool = False
) -> Tensor:
    """Softmax over the neighbours of scores ``[B, K*K, H, W]``.

    Args:
        border: ``"masked"``: weights are 0 outside the map and sum to 1; ``"zeros"``: neighbours
            outside take part and are multiplied by 0.
        zero_score: with ``"zeros"``, whether their score is 0 (a product with a key that is zero)
            or whatever was predicted for them.
    """
    kernel_size = round(scores.shape[1] ** 0.5)
    mask = outside(cells, tuple(scores.shape[2:]), kernel_size, scores.device)
    if border == "masked":
        return scores.masked_fill(mask, float("-inf")).softmax(1)
    if zero_score:
        scores = scores.masked_fill(mask, 0)
    return scores.softmax(1).masked_fill(mask, 0)


def in_cell(x: Tensor, size: tuple[int, int]) -> Tensor:
    """``x`` ``[B, C, h, w]`` at the cell that holds each pixel: nearest, exact at every ratio."""
    rows = base_cells(x.shape[2], size[0], False).to(x.device)
    columns = base_cells(x.shape[3], size[1], False).to(x.device)
    return x.index_select(2, rows).index_select(3, columns)


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """``x`` bilinearly at another size, averaged where it shrinks; itself where it fits."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
