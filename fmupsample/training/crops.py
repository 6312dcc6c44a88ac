"""From decoded squares to the tensors of a step, on the device that computes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fmupsample.training.data import Loaded, Sample
from fmupsample.training.masks import IGNORED

_LUMA = (0.299, 0.587, 0.114)


class Cropper:
    """Cuts, mirrors, resizes and normalises.

    Args:
        mean, std: of the backbone, for RGB in 0..1.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.device = device
        self.mean = torch.tensor(mean, device=device)[:, None, None]
        self.std = torch.tensor(std, device=device)[:, None, None]

    def pictures(
        self, samples: Sequence[tuple[Sample, Loaded]], size: int, colours: str = "colours"
    ) -> Tensor:
        """The crops at ``size``, normalised, ``[B, 3, size, size]``.

        Args:
            colours: which factors of the samples to apply, ``"colours"`` or ``"varied"``.
        """
        crops = []
        for sample, loaded in samples:
            pixels = self._window(sample, torch.from_numpy(loaded.pixels)).to(self.device)
            crop = pixels.permute(2, 0, 1).float().div_(255)[None]
            crop = _resize(crop, size)[0]
            factors = sample.colours
            if colours == "varied":
                factors = tuple(a * b for a, b in zip(factors, sample.varied, strict=True))
            crops.append(change_colours(crop, factors))
        return (torch.stack(crops) - self.mean) / self.std

    def regions(self, samples: Sequence[tuple[Sample, Loaded]], size: int) -> Tensor:
        """The regions of the crops, int64 ``[B, size, size]``; numbers as in each square."""
        return self._numbers([(s, loaded.regions) for s, loaded in samples], size)

    def labels(self, samples: Sequence[tuple[Sample, Loaded]], size: int) -> Tensor:
        """The labels of the crops, int64 ``[B, size, size]``; 255 where there are none."""
        none = np.full((1, 1), IGNORED, dtype=np.uint8)
        maps = [(s, none if loaded.labels is None else loaded.labels) for s, loaded in samples]
        return self._numbers(maps, size)

    def label_weights(self, samples: Sequence[tuple[Sample, Loaded]]) -> Tensor:
        """What the labels of each crop count, ``[B]``."""
        return torch.tensor([loaded.label_weight for _, loaded in samples], device=self.device)

    def offsets(self, samples: Sequence[tuple[Sample, Loaded]], block: int) -> Tensor:
        """Where each picture's blocks begin, pixels, int64 ``[B, 2]``."""
        shares = torch.tensor([sample.blocks for sample, _ in samples], dtype=torch.float64)
        return (shares * block).long().to(self.device)

    def _numbers(self, maps: list, size: int) -> Tensor:
        found = []
        for sample, values in maps:
            window = self._window(sample, torch.from_numpy(values)).to(self.device)
            # Numbers are exact in float32, and nearest-neighbour resizing keeps them.
            resized = F.interpolate(window[None, None].float(), (size, size), mode="nearest-exact")
            found.append(resized[0, 0].long())
        return torch.stack(found)

    @staticmethod
    def _window(sample: Sample, square: Tensor) -> Tensor:
        """The crop ``[S', S', ...]`` of ``[S, S, ...]``, mirrored where the sample says so."""
        whole = square.shape[0]
        side = max(1, round(sample.side * whole))
        top, left = (min(int(v * whole), whole - side) for v in (sample.top, sample.left))
        window = square[top : top + side, left : left + side]
        return window.flip(1) if sample.flip else window


def pixel_shifts(
    samples: Sequence[Sample], size: int, grid: tuple[int, int]
) -> list[tuple[int, int]]:
    """By how many pixels, down and right, the ``shifts`` term shifts crops of ``size`` pixels."""
    return [
        tuple(round(share * size / cells) for share, cells in zip(each.shift, grid, strict=True))
        for each in samples
    ]


def shift_images(images: Tensor, shifts: Sequence[tuple[int, int]]) -> Tensor:
    """Images ``[B, 3, H, W]`` seen from ``shifts`` pixels further down and right.

    Beyond its border an image goes on as its outermost pixels.
    """
    reach = max((abs(n) for pair in shifts for n in pair), default=0)
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    height, width = images.shape[-2:]
    seen = [
        each[:, reach + down : reach + down + height, reach + right : reach + right + width]
        for each, (down, right) in zip(padded, shifts, strict=True)
    ]
    return torch.stack(seen)


def _resize(crop: Tensor, size: int) -> Tensor:
    if crop.shape[-1] == size:
        return crop
    resized = F.interpolate(crop, (size, size), mode="bicubic", antialias=True)
    return resized.clamp_(0, 1)


def change_colours(picture: Tensor, factors: tuple[float, float, float]) -> Tensor:
    """Brightness, contrast and saturation of RGB in 0..1, ``[3, H, W]``, times the factors."""
    if factors == (1.0, 1.0, 1.0):
        return picture
    brightness, contrast, saturation = factors
    picture = picture * brightness
    luma = torch.tensordot(picture.new_tensor(_LUMA), picture, 1)[None]
    picture = luma + (picture - luma) * saturation
    middle = luma.mean()
    return (middle + (picture - middle) * contrast).clamp(0, 1)
