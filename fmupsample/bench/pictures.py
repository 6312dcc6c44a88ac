"""Pictures to measure on where the user names none."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fmupsample.images.find import Source, find_images

_EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "images"


def default_pictures() -> list[Source]:
    """The photographs beside the package in a checkout; none (a drawn one) elsewhere."""
    return find_images([_EXAMPLES]) if _EXAMPLES.is_dir() else []


def drawn_picture(side: int) -> np.ndarray:
    """uint8 ``[H, W, 3]``: discs of different colours on a gradient, with a little noise."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    picture = np.stack([90 + 80 * x, 110 + 60 * y, 150 - 70 * x * y], -1)
    for _ in range(12):
        cx, cy, radius = *random.uniform(0, 1, 2), random.uniform(0.05, 0.2)
        picture[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] = random.uniform(20, 235, 3)
    noisy = picture + random.normal(0, 4, picture.shape)
    return noisy.clip(0, 255).astype(np.uint8)
