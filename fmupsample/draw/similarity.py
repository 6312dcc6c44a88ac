"""Cosine similarity of every upsampled feature to the one at a point, without a C x H x W map.

With kernel weights ``w_n(P)`` and low-resolution features ``x_n``, the upsampled feature is
``y(P) = sum_n w_n(P) x_n`` and the similarity to a query q is ``y(P) . q / (|y(P)| |q|)``.
The numerator is linear in x: reassembling the one channel ``x . q`` gives it. The norm is not
linear, so it is summed over blocks of channels: reassemble a block, add up its squares, drop it.
The result is exact (nothing is approximated), the memory that of one block, and the time that of
one full reassembly however many points are asked for. The queries are read off the same blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BLOCK = 32  # channels reassembled at a time: 32 x 1000 x 1000 float32 is 128 MB


def similarity_maps(
    features: Tensor,
    reassemble: Callable[[Tensor], Tensor],
    points: Sequence[tuple[int, int]],
    *,
    queries: Tensor | None = None,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosine similarities to the upsampled features at some points.

    Args:
        features: ``[C, h, w]``, low resolution.
        reassemble: maps any values ``[V, h, w]`` on that grid to ``[V, H, W]``, linearly and with
            the same weights each time (an upsampler with its kernels filled in).
        points: ``(row, column)`` in the ``H x W`` map.
        queries: ``[P, C]`` of another map, see :func:`features_at`, in place of ``points``.
        block: channels per step (default: 32).

    Returns:
        ``(low, high)``: ``[P, h, w]`` and ``[P, H, W]`` float32 in -1..1, the similarity of each
        low-resolution and each upsampled feature to the *upsampled* feature at the point. 0 where
        a feature (or the query) is the zero vector.
    """
    values = features.float()
    block = block or BLOCK
    squares: Tensor | float = 0.0
    found = []
    for start in range(0, len(values), block):
        part = reassemble(values[start : start + block]).float()
        squares = squares + (part * part).sum(dim=0)
        if queries is None:
            found.append(torch.stack([part[:, y, x] for y, x in points]))
        del part
    query = torch.cat(found, dim=1) if queries is None else queries.to(values.device)  # [P, C]
    query = query / query.norm(dim=1, keepdim=True).clamp_min(1e-12)
    dots = torch.einsum("pc,chw->phw", query, values)
    low = dots / values.norm(dim=0).clamp_min(1e-12)
    high = reassemble(dots).float() / squares.sqrt().clamp_min(1e-12)
    return low.clamp(-1, 1), high.clamp(-1, 1)


def features_at(
    features: Tensor,
    reassemble: Callable[[Tensor], Tensor],
    points: Sequence[tuple[int, int]],
    *,
    block: int | None = None,
) -> Tensor:
    """The upsampled features at some points, float32 ``[P, C]``; arguments as above."""
    values = features.float()
    block = block or BLOCK
    found = []
    for start in range(0, len(values), block):
        part = reassemble(values[start : start + block]).float()
        found.append(torch.stack([part[:, y, x] for y, x in points]))
        del part
    return torch.cat(found, dim=1)
