"""What a head is trained for, without labels.

Two terms, both on standardised features (each channel with mean 0 and variance 1 over the data):

* *consistency*: the features of a crop, upsampled under the guidance of the crop and averaged over
  the cells of a finer grid, should be what the backbone says about the same crop enlarged twice
  (the idea of FeatUp, Fu et al. 2024, in the single-view form of JAFAR, Couairon et al. 2025);
* *regions*: every pixel should carry the mean feature of what is near it in the picture's own
  region (Felzenszwalb & Huttenlocher 2004): of its region within a block of a few cells, the blocks
  laid anew at random each time. The targets of the first term are themselves coarse; this one says
  where the edges are. LoftUp (Huang et al. 2025) does the like with masks of a large model. Without
  the blocks a pixel's target would lie out of reach of its neighbours, and the nearest thing within
  reach, the mean of them all, is a blur.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Standardise:
    """Per-channel standardisation with the moments of some features ``[N, C, h, w]``."""

    def __init__(self, features: Tensor):
        self.mean = features.mean((0, 2, 3), keepdim=True)
        self.rstd = features.var((0, 2, 3), keepdim=True).add(1e-6).rsqrt()

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean) * self.rstd


def distance(predicted: Tensor, target: Tensor) -> Tensor:
    """Cosine distance plus half the mean squared error, per position: ``[B, ...]``."""
    cosine = 1 - F.cosine_similarity(predicted, target, dim=1)
    return cosine + 0.5 * (predicted - target).square().mean(1)


def split_into_blocks(regions: Tensor, block: int) -> Tensor:
    """Cut the regions ``[B, H, W]`` of pictures along a grid of ``block`` pixels, laid at random.

    Returns:
        int64 ``[B, H, W]``; numbers are unique over the batch and without gaps.
    """
    batch, height, width = regions.shape
    y0, x0 = torch.randint(block, (2,)).tolist()
    rows = (torch.arange(height, device=regions.device) + y0) // block
    columns = (torch.arange(width, device=regions.device) + x0) // block
    blocks = rows[:, None] * (width // block + 2) + columns
    picture = torch.arange(batch, device=regions.device)[:, None, None]
    number = (picture * (int(blocks.max()) + 1) + blocks) * (int(regions.max()) + 1) + regions
    return number.unique(return_inverse=True)[1]


def region_means(features: Tensor, regions: Tensor) -> Tensor:
    """Replace every feature by the mean of its region.

    Args:
        features: ``[B, C, H, W]``.
        regions: int64 ``[B, H, W]``, unique over the batch, from 0.
    """
    index = regions.flatten()
    flat = features.permute(0, 2, 3, 1).flatten(0, 2)
    sizes = torch.bincount(index)
    sums = flat.new_zeros(len(sizes), flat.shape[1]).index_add_(0, index, flat)
    means = (sums / sizes[:, None])[index]
    return means.reshape(features.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)


def head_loss(
    upsampled: Tensor, low: Tensor, fine: Tensor, regions: Tensor, region_share: float
) -> tuple[Tensor, Tensor]:
    """The two terms.

    Args:
        upsampled: ``[B, C, H, W]``, standardised, as are all features here.
        low: ``[B, C, h, w]``, what was upsampled.
        fine: ``[B, C, 2h, 2w]``, the backbone's word on the enlarged crop.
        regions: int64 ``[B, H, W]``, unique over the batch.
        region_share: 0..1, how much of the region target is the region's mean; the rest is the
            pixel's own interpolated feature.

    Returns:
        (consistency, regions), scalars.
    """
    size = upsampled.shape[-2:]
    pooled = F.adaptive_avg_pool2d(upsampled, fine.shape[-2:])
    with torch.no_grad():
        both = 0.5 * (
            F.interpolate(low, size=size, mode="bilinear")
            + F.interpolate(fine, size=size, mode="bilinear")
        )
        target = region_share * region_means(both, regions) + (1 - region_share) * both
    return distance(pooled, fine).mean(), distance(upsampled, target).mean()
