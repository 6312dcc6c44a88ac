"""The regions of a picture: pixels that belong together by colour, and means over them.

Felzenszwalb & Huttenlocher, "Efficient Graph-Based Image Segmentation" (2004), by scikit-image, of
a picture of half the size, a quarter of the work. The borders are then moved to where the colours
change at full size.
"""

from __future__ import annotations

import importlib.util

import cv2
import numpy as np
import torch
from torch import Tensor

from fmupsample.errors import UsageError

# On a picture of half the size; chosen by looking, and by likeness to what scale 80, sigma 0.6 and
# 30 pixels give at full size.
_SCALE, _SIGMA, _MIN_SIZE = 60.0, 0.6, 8


def check_regions() -> None:
    """Refuse to look for regions without scikit-image.

    Raises:
        UsageError: it is not installed.
    """
    if importlib.util.find_spec("skimage") is None:
        raise UsageError(
            "the objective looks for regions in the pictures, with scikit-image: pip install "
            "'fmupsample[train]', or do without them by --config '{\"cluster_share\": 0}'"
        )


def find_regions(picture: np.ndarray) -> np.ndarray:
    """Regions of a picture uint8 ``[H, W, 3]``.

    Returns:
        int32 ``[H, W]``, numbers from 0. The same picture gives the same regions.
    """
    from skimage.segmentation import felzenszwalb

    height, width = picture.shape[:2]
    even = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    half = (even.shape[1] // 2, even.shape[0] // 2)
    small = cv2.resize(even, half, interpolation=cv2.INTER_AREA)
    regions = felzenszwalb(small, scale=_SCALE, sigma=_SIGMA, min_size=_MIN_SIZE)
    regions = regions.astype(np.int32).repeat(2, 0).repeat(2, 1)[:height, :width]
    return _move_borders(picture, np.ascontiguousarray(regions))


def _move_borders(picture: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """Give each pixel beside a border to the region beside it whose mean colour is nearest."""
    height, width = regions.shape
    flat, colours = regions.ravel(), picture.reshape(-1, 3)
    size = np.bincount(flat)
    sums = [np.bincount(flat, colours[:, c]) for c in range(3)]
    mean = (np.stack(sums, 1) / size[:, None]).astype(np.float32)
    padded = np.pad(regions, 1, mode="edge")
    beside = [
        padded[1 + y : 1 + y + height, 1 + x : 1 + x + width]
        for y, x in ((0, 1), (0, -1), (1, 0), (-1, 0))
    ]
    pixels = np.flatnonzero(np.logical_or.reduce([view != regions for view in beside]))
    candidates = np.stack([flat[pixels], *(view.ravel()[pixels] for view in beside)])
    difference = mean[candidates] - colours[pixels].astype(np.float32)  # [5, N, 3]
    nearest = np.einsum("knc,knc->kn", difference, difference).argmin(0)
    moved = flat.copy()
    moved[pixels] = candidates[nearest, np.arange(len(pixels))]
    return moved.reshape(height, width)


def split_into_blocks(regions: Tensor, block: int, offsets: Tensor) -> Tensor:
    """Cut the regions of pictures along a grid of ``block`` pixels.

    A pixel takes its features from a few cells around it. Without the blocks the mean over its
    region would lie out of reach, and the nearest thing within reach, a mean of them all, is a
    blur.

    Args:
        regions: integers ``[B, H, W]``.
        offsets: int64 ``[B, 2]``, where each picture's grid begins, rows and columns.

    Returns:
        int64 ``[B, H, W]``; numbers are unique over the batch and without gaps, in its order.
    """
    batch, height, width = regions.shape
    rows = (torch.arange(height, device=regions.device) + offsets[:, :1]) // block  # [B, H]
    columns = (torch.arange(width, device=regions.device) + offsets[:, 1:]) // block
    across = width // block + 2
    blocks = rows[:, :, None] * across + columns[:, None, :]
    picture = torch.arange(batch, device=regions.device)[:, None, None]
    most = (height // block + 2) * across
    number = (picture * most + blocks) * (int(regions.max()) + 1) + regions
    return number.unique(return_inverse=True)[1]


def means_of_regions(x: Tensor, regions: Tensor) -> Tensor:
    """``x`` ``[B, K, H, W]`` with the mean of its region at every pixel.

    Args:
        regions: int64 ``[B, H, W]``, numbers unique over the batch.
    """
    number = regions.flatten()
    rows = x.transpose(0, 1).flatten(1).T  # [B H W, K]
    sizes = torch.bincount(number).clamp_min(1)
    sums = rows.new_zeros(len(sizes), rows.shape[1]).index_add_(0, number, rows)
    means = (sums / sizes[:, None])[number]
    return means.T.unflatten(1, regions.shape).transpose(0, 1)
