"""From decoded squares to the tensors of a step, on the device that computes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fmupsample.training.masks import IGNORED
from fmupsample.training.samples import Sample, Samples


class Cropper:
    """Cuts, mirrors, resizes and normalises.

    Args:
        mean, std: of the backbone, for RGB in 0..1.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.device = device
        self.mean = torch.tensor(mean, device=device)[:, None, None]
        self.std = torch.tensor(std, device=device)[:, None, None]

    def pictures(self, samples: Samples, size: int) -> Tensor:
        """The crops at ``size``, normalised, ``[B, 3, size, size]``."""
        crops = []
        for sample, loaded in samples:
            pixels = self._window(sample, torch.from_numpy(loaded.pixels)).to(self.device)
            crop = pixels.permute(2, 0, 1).float().div_(255)[None]
            crops.append(_resize(crop, size)[0])
        return (torch.stack(crops) - self.mean) / self.std

    def regions(self, samples: Samples, size: int) -> Tensor:
        """The regions of the crops, int64 ``[B, size, size]``; numbers as in each square."""
        return self._numbers([(s, loaded.regions) for s, loaded in samples], size)

    def labels(self, samples: Samples, size: int) -> Tensor:
        """The labels of the crops, int64 ``[B, size, size]``; 255 where there are none."""
        none = np.full((1, 1), IGNORED, dtype=np.uint8)
        maps = [(s, none if loaded.labels is None else loaded.labels) for s, loaded in samples]
        return self._numbers(maps, size)

    def label_weights(self, samples: Samples) -> Tensor:
        """What the labels of each crop count, ``[B]``."""
        return torch.tensor([loaded.label_weight for _, loaded in samples], device=self.device)

    def offsets(self, samples: Samples, block: int) -> Tensor:
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


def _resize(crop: Tensor, size: int) -> Tensor:
    if crop.shape[-1] == size:
        return crop
    resized = F.interpolate(crop, (size, size), mode="bicubic", antialias=True)
    return resized.clamp_(0, 1)
