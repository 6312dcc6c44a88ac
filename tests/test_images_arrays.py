"""Bringing arrays to another size."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fmupsample.images.arrays import planes, resize


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((90, 120), (42, 57)), ((400, 30), (17, 29)), ((31, 40), (64, 80)), ((1, 1), (14, 28)),
        ((7, 900), (1, 3)),
    ],
)  # fmt: skip
def test_it_is_pillows_bicubic(channels, shape, size):
    pixels = noise(*shape, *channels)
    theirs = Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    ours = resize(pixels, size)
    assert ours.dtype == np.uint8 and ours.flags.c_contiguous
    off = np.abs(ours.astype(int) - np.asarray(theirs))
    assert off.max() <= 2 and off.mean() < 0.3  # rounding, once or twice


def test_flat_colours_stay_and_equal_sizes_are_not_touched():
    flat = np.full((60, 90, 3), (220, 180, 20), dtype=np.uint8)
    assert (resize(flat, (17, 200)) == flat[0, 0]).all()
    assert resize(flat, (60, 90)) is flat


def test_arrays_that_torch_cannot_express():
    """Read-only, as decoded pictures are, and turned round."""
    pixels = noise(40, 50, 3)
    wanted = resize(pixels, (20, 30))
    sealed = pixels.copy()
    sealed.flags.writeable = False
    assert (resize(sealed, (20, 30)) == wanted).all()
    turned = resize(pixels[::-1, ::-1].copy(), (20, 30))
    assert (resize(pixels[::-1, ::-1], (20, 30)) == turned).all()
    assert planes(pixels).numpy().base is not None and planes(pixels).shape == (3, 40, 50)
    assert np.shares_memory(planes(pixels).numpy(), pixels)
