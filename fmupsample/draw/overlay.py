"""Colours laid over a photograph."""

from __future__ import annotations

import numpy as np

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
BACKGROUND = (30, 30, 34)  # what is not foreground


def grey(photo: np.ndarray) -> np.ndarray:
    """The photograph without its colours: uint8 ``[H, W, 3]`` -> the same shape."""
    luma = (photo.astype(np.float32) @ _LUMA).round().astype(np.uint8)
    return np.repeat(luma[..., None], 3, axis=2)


def overlay(photo: np.ndarray, colours: np.ndarray, opacity: float | np.ndarray) -> np.ndarray:
    """``colours`` over ``photo``, both uint8 ``[H, W, 3]``.

    Args:
        opacity: 0 (only the photograph) to 1, one number or ``[H, W]``.
    """
    amount = np.asarray(opacity, dtype=np.float32)
    if amount.ndim == 2:
        amount = amount[..., None]
    mixed = photo * (1 - amount) + colours * amount
    return np.clip(mixed.round(), 0, 255).astype(np.uint8)


def pca_overlay(photo: np.ndarray, colours: np.ndarray, opacity: float = 0.62) -> np.ndarray:
    """PCA colours over the grey photograph: the hue of the features, the detail of the picture.

    The photograph's contrast is halved first, so that black coats and white walls keep a colour.
    """
    flat = 64 + grey(photo).astype(np.float32) / 2
    return overlay(flat, colours, opacity)


def darken(colours: np.ndarray, foreground: np.ndarray) -> np.ndarray:
    """``colours`` uint8 ``[H, W, 3]`` with all but the ``foreground`` (``[H, W]``, 0..1) dark."""
    dark = np.empty_like(colours)
    dark[...] = BACKGROUND
    return overlay(dark, colours, foreground)
