"""Small linear filters on maps ``[B, C, H, W]``: box mean, Gaussian, guided filter, resampling."""

from __future__ import annotations

from collections.abc import Callable
from math import exp

import torch
import torch.nn.functional as F
from torch import Tensor

from fmupsample.layers.chunks import over_channels
from fmupsample.ops.grid import interpolation_part


def box_mean(x: Tensor, radius: int) -> Tensor:
    """Mean over the ``(2r+1)^2`` window, counting only pixels inside the map."""
    if x.device.type == "cuda":
        return pooled_box_mean(x, radius)
    x = F.pad(x, (radius,) * 4)
    # The true count of a clipped window is the product of its sides.
    counts = []
    for dim in (2, 3):
        shape = [1, 1, 1, 1]
        shape[dim] = x.shape[dim]
        inside = x.new_zeros(shape)
        inside.narrow(dim, radius, x.shape[dim] - 2 * radius).fill_(1)
        counts.append(_window_sum(inside, dim, radius))
        x = _window_sum(x, dim, radius)
    return x * (counts[0] * counts[1]).reciprocal_()


def pooled_box_mean(x: Tensor, radius: int) -> Tensor:
    """:func:`box_mean` in two passes over the map: what counts on a GPU, and is slow on a CPU."""
    for window in ((radius, 0), (0, radius)):
        size = [2 * r + 1 for r in window]
        x = F.avg_pool2d(x, size, stride=1, padding=window, count_include_pad=False)
    return x


def _window_sum(x: Tensor, dim: int, radius: int) -> Tensor:
    """Sums of ``2r+1`` neighbours along ``dim``, shorter by 2r: log2 many additions by doubling."""
    size, length = 2 * radius + 1, x.shape[dim] - 2 * radius
    power, width = x, 1  # power[i] = sum of `width` entries from i
    total, done = None, 0  # total[i] = sum of the first `done` entries of the window at i
    while True:
        if size & width:
            part = power.narrow(dim, done, length)
            total = part if total is None else total + part
            done += width
        if done == size:
            return total
        reach = power.shape[dim] - width
        power, width = power.narrow(dim, 0, reach) + power.narrow(dim, width, reach), 2 * width


def gaussian3(x: Tensor, sigma: float = 1.0) -> Tensor:
    """3 x 3 Gaussian with replicate padding, normalised to sum 1."""
    return over_channels(lambda part: _gaussian3(part, sigma), x)


def _gaussian3(x: Tensor, sigma: float) -> Tensor:
    side = exp(-1 / (2 * sigma**2))
    centre, side = 1 / (1 + 2 * side), side / (1 + 2 * side)
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    rows = padded[:, :, :-2] + padded[:, :, 2:]
    rows = torch.add(padded[:, :, 1:-1] * centre, rows, alpha=side)
    columns = rows[..., :-2] + rows[..., 2:]
    return torch.add(rows[..., 1:-1] * centre, columns, alpha=side)


def half_grid(size: int) -> slice:
    """The pixels of an axis that nearest-neighbour subsampling by two keeps."""
    return slice(0, max(1, size // 2) * 2, 2)


def upsampled_on_half_grid(
    x: Tensor, size: tuple[int, int], part: tuple[slice, slice] = (slice(None), slice(None))
) -> Tensor:
    """``x`` upsampled bilinearly to ``size``, evaluated on (a part of) the half grid only."""
    (rows, uy), (columns, ux) = (
        interpolation_part(cells, n, torch.arange(n)[half_grid(n)][wanted])
        for cells, n, wanted in zip(x.shape[2:], size, part, strict=True)
    )
    return uy.to(x) @ x[:, :, rows, columns] @ ux.to(x).T


def fast_guided_filter(
    guide: Tensor,
    target_half: Tensor,
    radius: int,
    eps: float,
    resize: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Per-channel guided filter with coefficients computed at half resolution.

    He & Sun, "Fast Guided Filter" (2015). In each window the target is fitted as ``a guide + b``;
    the fits of all windows over a pixel are averaged, and resized to the guide.

    Args:
        guide: ``[B, C, H, W]``.
        target_half: ``[B, C, H', W']``, the target on the guide's half grid.
        radius: of the windows, in pixels of the half grid.
        eps: added to the guide's variance, in squared units of the guide.
        resize: from the half grid to the guide's, where the guide is a part of a larger map.

    Returns:
        the filtered target, ``[B, C, H, W]``.
    """
    return over_channels(
        lambda some, of_target: _guided_filter(some, of_target, radius, eps, resize),
        guide,
        target_half,
    )


def _guided_filter(
    guide: Tensor,
    target_half: Tensor,
    radius: int,
    eps: float,
    resize: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    guide_half = guide[:, :, half_grid(guide.shape[2]), half_grid(guide.shape[3])]
    # Centring by one constant per channel changes nothing but the rounding of the moments.
    centre_g = guide_half.mean((2, 3), keepdim=True)
    centre_t = target_half.mean((2, 3), keepdim=True)
    g, t = guide_half - centre_g, target_half - centre_t
    mean_g, mean_t, mean_gt, mean_gg = box_mean(torch.cat([g, t, g * t, g * g], 1), radius).chunk(
        4, 1
    )
    a = (mean_gt - mean_g * mean_t) / (mean_gg - mean_g * mean_g + eps)
    b = mean_t - a * mean_g + centre_t - a * centre_g
    ab = box_mean(torch.cat([a, b], 1), radius)
    if resize is not None:
        ab = resize(ab)
    else:
        ab = F.interpolate(ab, size=guide.shape[2:], mode="bilinear", align_corners=False)
    a, b = ab.chunk(2, 1)
    return torch.addcmul(b, a, guide)
