"""Pictures, a backbone and an upsampler that are small enough to check by hand."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fmupsample.upsamplers.base import Upsampler
from fmupsample.video.clips import quiet


def gradient(height: int, width: int) -> np.ndarray:
    """RGB, uint8 ``[H, W, 3]``: red grows to the right, green downwards, blue is constant."""
    red = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    green = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return np.stack([red, green, np.full_like(red, 90)], axis=-1).round().astype(np.uint8)


def draw(path: Path, height: int = 40, width: int = 60, **options: object) -> Path:
    """Save a gradient at ``path``, in the format of its extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(gradient(height, width)).save(path, **options)
    return path


class PatchMeans(nn.Module):
    """A "backbone" with six channels: the mean of R, G and B per 8 x 8 patch, and their doubles."""

    name, architecture, layer = "patch-means.v1", "patch-means", 0
    channels = 6
    stride = size_multiple = (8, 8)
    default_image_size = 32
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    fingerprint = "0123456789ab"

    def __init__(self, fixed_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.fixed_size = fixed_size
        self.batches: list[tuple[int, ...]] = []

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // 8, size[1] // 8

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(tuple(images.shape))
        means = F.avg_pool2d(images, 8)
        return torch.cat([means, 2 * means], dim=1)


class Blocks(Upsampler):
    """Nearest-neighbour upsampling, with kernels: one weight of 1 per pixel."""

    name = fingerprint = "blocks"

    def kernels(self, x: Tensor, guidance: Tensor | None = None, size=None) -> Tensor:
        height, width = self.check(x, guidance, size)
        return x.new_ones(x.shape[0], 1, height, width)

    def reassemble(self, weights: Tensor, value: Tensor) -> Tensor:
        return F.interpolate(value, size=weights.shape[-2:], mode="nearest-exact") * weights


class NotLinear(Upsampler):
    """Doubles and enlarges; has no kernels."""

    name = fingerprint = "not-linear"
    linear_in_value = False

    def forward(self, x: Tensor, guidance: Tensor | None = None, *, size=None) -> Tensor:
        return 2 * F.interpolate(x, size=self.check(x, guidance, size), mode="nearest-exact")


def film(
    path: Path, frames: Iterable[np.ndarray] | int = 10, *, fps: float = 10.0, codec: str = ""
) -> Path:
    """Save a video of RGB frames uint8 ``[H, W, 3]``, or of so many grey ones (:func:`level`)."""
    if isinstance(frames, int):
        frames = [np.full((48, 64, 3), level(n), np.uint8) for n in range(frames)]
    frames = list(frames)
    path.parent.mkdir(parents=True, exist_ok=True)
    code = cv2.VideoWriter_fourcc(*(codec or ("MJPG" if path.suffix == ".avi" else "mp4v")))
    size = frames[0].shape[1::-1] if frames else (64, 48)
    with quiet():  # FFmpeg asks once in a process whether it may talk
        writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, code, fps, size)
    assert writer.isOpened()
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[:, :, ::-1]))
    writer.release()
    return path


def level(number: int) -> int:
    """How bright the frame of this number is: tells the first 30 apart."""
    return 8 + 8 * (number % 30)


def number(pixels: np.ndarray) -> int:
    """Of a frame that :func:`film` drew, its number."""
    return round((float(pixels.mean()) - 8) / 8)


def cut(path: Path, share: float) -> Path:
    """Leave only the first part of a file."""
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    return path
