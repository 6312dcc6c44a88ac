"""From decoded pixels to what a backbone takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fmupsample.images.size import Frame


def fit_to_frame(pixels: np.ndarray, frame: Frame) -> np.ndarray:
    """Resize ``pixels`` (uint8 ``[H, W, 3]``) as ``frame`` says -> canvas, uint8 ``[H, W, 3]``.

    Bicubic, antialiased when shrinking; the padding repeats the last row and column.
    """
    height, width = frame.placed
    if pixels.shape[:2] != frame.placed:
        resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(resized)
    below, right = frame.canvas[0] - height, frame.canvas[1] - width
    if below or right:
        pixels = np.pad(pixels, ((0, below), (0, right), (0, 0)), mode="edge")
    return pixels


def normalise(canvas: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 ``[H, W, 3]`` -> float32 ``[3, H, W]``: RGB in 0..1, minus ``mean``, over ``std``."""
    image = torch.empty(3, *canvas.shape[:2])
    # By NumPy: decoded arrays are read-only, which torch cannot express.
    image.numpy()[:] = canvas.transpose(2, 0, 1)
    return _scaled(image, mean, std)


def normalise_part(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The same of any part of a canvas ``[..., 3, h, w]`` that is a uint8 tensor."""
    part = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device)
    return _scaled(part.copy_(pixels), mean, std)


def _scaled(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """In place, of 0..255."""
    centre, scale = (image.new_tensor(values)[:, None, None] for values in (mean, std))
    return image.div_(255.0).sub_(centre).div_(scale)
