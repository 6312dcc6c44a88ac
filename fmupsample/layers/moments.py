"""Group normalisation as numbers: statistics, and the per-sample affine map they amount to.

GroupNorm is ``x * scale + shift`` with one scale and shift per sample and channel. Knowing these,
a normalisation folds into the convolution that follows it and never costs a pass over the map.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor, nn

from fmupsample.layers.chunks import recorded
from fmupsample.ops.grid import interpolation_matrix
from fmupsample.ops.memory import on_huge_pages


def largest_group_count(channels: int, at_most: int = 32) -> int:
    """The largest number of groups, at most ``at_most``, that divides ``channels``."""
    return max(n for n in range(1, at_most + 1) if gcd(channels, n) == n)


def group_moments(x: Tensor, groups: int, *, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance per sample and group of ``[B, C, ...]``: two ``[B, groups]``.

    ``overwrite``: ``x`` is contiguous and not needed any more; its memory may be used.
    """
    grouped = x.reshape(x.shape[0], groups, -1)
    # Two vectorised passes: as exact as torch.var_mean, whose CPU kernel is several times slower.
    mean = grouped.mean(2)
    if overwrite:
        return mean, grouped.sub_(mean[:, :, None]).square_().mean(2)
    if x.device.type != "cpu" or recorded(x):
        return mean, (grouped - mean[:, :, None]).square_().mean(2)
    # Group by group, in cache.
    variances = [
        (part - centre[:, None]).square_().mean(1)
        for part, centre in zip(grouped.unbind(1), mean.unbind(1), strict=True)
    ]
    return mean, torch.stack(variances, 1)


def upsampled_group_moments(x: Tensor, size: tuple[int, int], groups: int) -> tuple[Tensor, Tensor]:
    """:func:`group_moments` of ``x`` ``[B, C, h, w]`` bilinearly upsampled to ``size``, without it.

    With interpolation matrices U, the mean of ``Uy x Ux^T`` needs only the column sums of U, and
    the second moment is ``<x, (Uy^T Uy) x (Ux^T Ux)>``. In float64 (where the device has it),
    centred before squaring.
    """
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    b, c, h, w = x.shape
    height, width = size
    uy = interpolation_matrix(h, height).to(x.device, wide)
    ux = interpolation_matrix(w, width).to(x.device, wide)
    grouped = x.to(wide).reshape(b, groups, c // groups, h, w)
    mean = torch.einsum("bgchw,h,w->bg", grouped, uy.mean(0), ux.mean(0)) / (c // groups)
    centred = grouped - mean[:, :, None, None, None]
    smoothed = (uy.T @ uy / height) @ centred @ (ux.T @ ux / width)
    variance = (centred * smoothed).sum((2, 3, 4)) / (c // groups)
    return mean.to(x.dtype), variance.clamp_min(0).to(x.dtype)


def pooled_moments(parts: list[tuple[Tensor, Tensor]], counts: list[int]) -> tuple[Tensor, Tensor]:
    """Moments of a whole from the moments and element counts of its parts (Chan et al. 1979)."""
    means = torch.stack([m for m, _ in parts])
    share = means.new_tensor([n / sum(counts) for n in counts])[:, None, None]
    mean = (share * means).sum(0)
    variance = (share * (torch.stack([v for _, v in parts]) + (means - mean) ** 2)).sum(0)
    return mean, variance


def affine(norm: nn.GroupNorm, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift, each ``[B, C]``, that ``norm`` applies given the moments ``[B, groups]``."""
    repeat = norm.num_channels // norm.num_groups
    scale = norm.weight.to(mean) * (variance + norm.eps).rsqrt().repeat_interleave(repeat, 1)
    return scale, norm.bias.to(mean) - mean.repeat_interleave(repeat, 1) * scale


def apply_affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``x * scale + shift`` per sample and channel."""
    return x * scale[:, :, None, None] + shift[:, :, None, None]


def pointwise_after_norm(
    x: Tensor,
    norm: nn.GroupNorm,
    weight: Tensor,
    bias: Tensor,
    moments: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``conv1x1(GroupNorm(x))`` as one product: ``[B, C, H, W]`` -> ``[B, O, H, W]``.

    ``weight`` is ``[O, C]``, ``bias`` ``[O]``; ``moments`` those of ``x``, where it is only a part
    of what is normalised.
    """
    if moments is None:
        moments = group_moments(x, norm.num_groups)
    scale, shift = affine(norm, *moments)
    folded = weight.to(x) * scale[:, None, :]
    offset = bias.to(x) + shift @ weight.to(x).T
    flat = x.flatten(2)
    if recorded(x, folded, offset):
        return torch.baddbmm(offset[:, :, None], folded, flat).unflatten(2, x.shape[2:])
    out = on_huge_pages(offset.new_empty(*offset.shape, flat.shape[2]))
    torch.bmm(folded, flat, out=out)
    return out.add_(offset[:, :, None]).unflatten(2, x.shape[2:])
