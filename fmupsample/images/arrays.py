"""Pictures as arrays: planes and pixels, and one filter to bring them to another size."""

from __future__ import annotations

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def planes(pixels: np.ndarray) -> Tensor:
    """uint8 ``[H, W, C]`` -> ``[C, H, W]``, of the same memory where torch can express it."""
    if not pixels.flags.writeable or min(pixels.strides) < 0:
        pixels = pixels.copy()
    return torch.from_numpy(pixels).permute(2, 0, 1)


def interleaved(maps: Tensor) -> np.ndarray:
    """uint8 ``[C, H, W]`` on any device -> ``[H, W, C]``."""
    # OpenCV's takes a tenth of the time of a transposed copy.
    return cv2.merge(tuple(maps.cpu().numpy())).reshape(*maps.shape[1:], -1)


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 ``[h, w, 3]`` or ``[h, w]`` at ``size`` ``(H, W)``: bicubic, antialiased on shrinking.

    What Pillow's bicubic gives within 2 of 255, in a sixth of the time of a core that has AVX2.
    """
    if pixels.shape[:2] == tuple(size):
        return pixels
    if pixels.ndim == 2:
        return resize(pixels[..., None], size)[..., 0]
    found = F.interpolate(
        planes(pixels)[None], size, mode="bicubic", align_corners=False, antialias=True
    )
    return interleaved(found[0])
