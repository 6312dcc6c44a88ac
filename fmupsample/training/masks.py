"""The `masks` term: a pixel takes its features from cells of its own segment.

Segments come from any segmentation data; their classes do not matter. With w the kernel weights
of a pixel and s_j the share of cell j that belongs to the pixel's own segment, the loss of the
pixel is ``-log sum_j w_j s_j``. It counts only where it can be told well from badly: where the
cells around the pixel are not all of its segment. The backbone plays no part in it, and neither do
features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fmupsample.upsamplers.base import Upsampler

IGNORED = 255  # the label of pixels that count nowhere
_MOST_SEGMENTS = 32  # segments of an image that are told apart; further ones share a channel
_LEAST = 1e-3  # of the own share: keeps a single pixel from being all of the loss
_UNIFORM = 0.98  # pixels whose neighbourhood is that much of their own segment do not count


def segments(labels: Tensor) -> Tensor:
    """Labels ``[B, H, W]``, any integers, as numbers from 0 within each image; ignored ones stay.

    The most frequent ones come first; those beyond 31 share the last number.
    """
    found = torch.full_like(labels, IGNORED)
    for own, into in zip(labels, found, strict=True):
        values, counts = own[own != IGNORED].unique(return_counts=True)
        for number, value in enumerate(values[counts.argsort(descending=True)]):
            into[own == value] = min(number, _MOST_SEGMENTS - 1)
    return found


def segment_shares(numbers: Tensor, cells: tuple[int, int], widen: float = 1.0) -> Tensor:
    """The share of each segment in each cell, float32 ``[B, S, h, w]``; ignored pixels have none.

    Args:
        numbers: int64 ``[B, H, W]``, of :func:`segments`.
        widen: the side of the square that shares are taken over, in cells, about the cell's centre.
            A patch of a backbone with shifted views is wider than a cell, and a patch's features
            tell of what is beside it.
    """
    count = int(numbers[numbers != IGNORED].max()) + 1 if (numbers != IGNORED).any() else 1
    one_hot = F.one_hot(numbers.where(numbers != IGNORED, count), count + 1)[..., :count]
    one_hot = one_hot.permute(0, 3, 1, 2).float()
    if widen > 1:
        for dim, n in ((2, cells[0]), (3, cells[1])):
            one_hot = _smoothed(one_hot, dim, round((widen - 1) * one_hot.shape[dim] / n))
    return F.adaptive_avg_pool2d(one_hot, cells)


def _smoothed(x: Tensor, dim: int, more: int) -> Tensor:
    """A running mean over ``more + 1`` pixels along ``dim``, borders repeated."""
    if more < 1:
        return x
    before, after = more // 2, more - more // 2
    pad = (0, 0, before, after) if dim == 2 else (before, after, 0, 0)
    kernel = (more + 1, 1) if dim == 2 else (1, more + 1)
    return F.avg_pool2d(F.pad(x, pad, mode="replicate"), kernel, 1)


def mask_loss(
    upsampler: Upsampler,
    weights: Tensor,
    numbers: Tensor,
    shares: Tensor,
    image_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of kernel weights, and the share of counted pixels that come out wrong.

    Args:
        weights: what ``upsampler.kernels`` gave.
        numbers: int64 ``[B, H, W]``; shares: ``[B, S, h, w]``, of :func:`segment_shares`.
        image_weights: ``[B]``, what the pixels of each image count; default: all alike.

    Returns:
        Two scalars; 0 where no pixel counts.
    """
    upsampled = upsampler.reassemble(weights, shares.to(weights.dtype))  # [B, S, H, W]
    own = numbers.clamp_max(shares.shape[1] - 1)[:, None]
    right = upsampled.gather(1, own)[:, 0]
    with torch.no_grad():
        around = F.avg_pool2d(F.pad(shares, (1, 1, 1, 1), mode="replicate"), 3, 1)
        around = F.interpolate(around, numbers.shape[-2:], mode="nearest").gather(1, own)[:, 0]
        counted = ((numbers != IGNORED) & (around < _UNIFORM)).to(right.dtype)
        if image_weights is not None:
            counted = counted * image_weights.to(counted)[:, None, None]
        wrong = (upsampled.argmax(1) != own[:, 0]).to(right.dtype)
    total = counted.sum().clamp_min(1e-6)
    loss = -(right.clamp_min(_LEAST).log() * counted).sum() / total
    return loss, (wrong * counted).sum() / total
