"""The pixels of whatever a program has as an image: a file, a Pillow image, an array, a tensor.

Arrays are ``[H, W, 3]`` (or grey, ``[H, W]``) as NumPy, OpenCV and scikit-image have them, tensors
``[3, H, W]`` as torchvision has them. uint8 numbers go from 0 to 255, floating ones from 0 to 1;
these are rounded to 8 bits, as image files hold them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fmupsample.errors import ShapeError, UsageError
from fmupsample.images.read import read_picture, rgb_pixels

Size = tuple[int, int]
_OVERSHOOT = 0.05  # beyond 0 and 1: what a bicubic filter leaves is no other range


def read_input(image: Any, wanted: Callable[[Size], Size] | None = None) -> tuple[np.ndarray, Size]:
    """Give the RGB pixels of ``image``, uint8 ``[h, w, 3]``, and its full size ``(H, W)``.

    Args:
        image: a path, a Pillow image, an array or a tensor, as the module says.
        wanted: as of :func:`.read_picture`; only files are decoded at a fraction of their size.

    Raises:
        ImageError: the file cannot be read.
        ShapeError: an array or tensor of another shape.
        UsageError: something else, or numbers in another range.
    """
    if isinstance(image, str | os.PathLike):
        return read_picture(image, wanted)
    if isinstance(image, Image.Image):
        pixels = rgb_pixels(image)
    elif isinstance(image, Tensor):
        pixels = _interleaved(image)
    elif isinstance(image, np.ndarray):
        pixels = _eight_bits(_three_channels(image))
    else:
        raise UsageError(
            f"an image of type {type(image).__name__} is not understood: give a path, a Pillow "
            "image, a uint8 array [H, W, 3] or a tensor [3, H, W]"
        )
    return pixels, pixels.shape[:2]


def _interleaved(image: Tensor) -> np.ndarray:
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ShapeError(f"an image as a tensor is [3, H, W], got {list(image.shape)}")
    image = image.detach().cpu()
    if image.dtype in (torch.bfloat16, torch.float16):
        image = image.float()
    return _eight_bits(image.permute(1, 2, 0).numpy())


def _three_channels(image: np.ndarray) -> np.ndarray:
    if image.ndim == 2:
        image = np.stack([image] * 3, axis=-1)
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ShapeError(
            f"an image as an array is RGB [H, W, 3] or grey [H, W], got {list(image.shape)}"
        )
    return image


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    if pixels.dtype.kind != "f":
        raise UsageError(
            f"an image of {pixels.dtype} numbers has no agreed white: give uint8 from 0 to 255, or "
            "floating numbers from 0 to 1"
        )
    low, high = float(pixels.min()), float(pixels.max())
    if not -_OVERSHOOT <= low <= high <= 1 + _OVERSHOOT:  # also where there is a NaN
        raise UsageError(
            f"an image of floating numbers goes from 0 to 1, and this one from {low:.3g} to "
            f"{high:.3g}: {_remedy(low, high)}"
        )
    return np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)


def _remedy(low: float, high: float) -> str:
    if low >= 0 and 1 < high <= 255:
        return "divide it by 255, or give it as uint8"
    if -10 < low < 0 and high < 10:
        return "what is normalised already is for the backbone itself, backbone(images)"
    return "give uint8 from 0 to 255"
