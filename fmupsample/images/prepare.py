"""From decoded pixels to what a backbone takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fmupsample.images.arrays import planes, resize
from fmupsample.images.size import Frame


def fit_to_frame(pixels: np.ndarray, frame: Frame) -> np.ndarray:
    """Resize ``pixels`` (uint8 ``[H, W, 3]``) as ``frame`` says -> canvas, uint8 ``[H, W, 3]``.

    Bicubic, antialiased when shrinking; the padding repeats the last row and column.
    """
    height, width = frame.placed
    pixels = resize(pixels, frame.placed)
    below, right = frame.canvas[0] - height, frame.canvas[1] - width
    if below or right:
        pixels = np.pad(pixels, ((0, below), (0, right), (0, 0)), mode="edge")
    return pixels


def normalise(canvas: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 ``[H, W, 3]`` -> float32 ``[3, H, W]``: RGB in 0..1, minus ``mean``, over ``std``."""
    return normalise_part(planes(canvas), mean, std)


def normalise_part(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The same of any part of a canvas ``[..., 3, h, w]`` that is a uint8 tensor."""
    part = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    centre, scale = (part.new_tensor(values)[:, None, None] for values in (mean, std))
    return part.div_(255.0).sub_(centre).div_(scale)
