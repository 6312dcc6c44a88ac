"""Features of crops, from the frozen backbone or from memory.

New crops at every step say most, but each costs two passes of the backbone, one of them over an
enlarged picture. Where a run sees every square so often that new crops add little, it takes a fixed
number of crops of each instead and keeps their features: a third to half of a step's time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fmupsample.backbones import Backbone
from fmupsample.device import PRECISIONS, autocast
from fmupsample.training.config import TrainConfig
from fmupsample.training.crops import Cropper
from fmupsample.training.samples import Samples

# How many crops of a square are as good as new ones, and how often each must come for them to pay.
CROPS, _REPEATS = 16, 3

_LIMIT = torch.finfo(torch.float16).max


def plan_crops(
    config: TrainConfig, backbone: Backbone, squares: int, world: int, keep_bytes: int
) -> int:
    """How many crops of each square a run takes; 0: every crop is a new one.

    What the configuration says; else a fixed number if each would come several times, and if
    the features of all of them fit into ``keep_bytes``.
    """
    if config.crops_kept is not None:
        return config.crops_kept
    samples = config.steps * config.batch_size * world
    if samples < _REPEATS * CROPS * squares:
        return 0
    cells = sum(math.prod(backbone.grid((size, size))) for size in config.image_sizes)
    each = 2 * backbone.channels * cells * (1 + config.enlarge**2)
    return CROPS if each * CROPS * squares / world <= keep_bytes else 0


class Features:
    """Features of crops as they are and enlarged: float32, on the device.

    Args:
        enlarge: how many times; 0: not at all.
        precision: of the backbone's arithmetic.
        keep_bytes: memory for features of views that come again, in half precision; 0: none. With
            it all features are rounded to half precision, whether they are kept or not, so that
            nothing depends on what is in memory.
    """

    def __init__(
        self,
        backbone: Backbone,
        cropper: Cropper,
        *,
        enlarge: int,
        precision: str,
        keep_bytes: int = 0,
    ) -> None:
        self.backbone, self.cropper, self.enlarge = backbone, cropper, enlarge
        self.dtype = PRECISIONS[precision]
        self.keeping = keep_bytes > 0
        self._left = keep_bytes
        self._kept: dict[tuple[int, int, int], list[Tensor]] = {}

    def __call__(self, samples: Samples, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of crops ``[B, 3, H, W]``: ``low`` ``[B, C, h, w]``, and ``fine`` ``[B, C, e h, e w]`` of
        the crops enlarged e times, or ``None``."""
        size = images.shape[-1]
        keys = [(sample.square, sample.view, size) for sample, _ in samples]
        new = [i for i, key in enumerate(keys) if key not in self._kept]
        made: dict[int, list[Tensor]] = {}
        if new:
            whole = [self.compute(images[new])]
            if self.enlarge:
                larger = self.cropper.pictures([samples[i] for i in new], self.enlarge * size)
                whole.append(self.compute(larger))
            for n, i in enumerate(new):
                own = [part[n] for part in whole]
                made[i] = self._keep(keys[i], own) if self.keeping else own
        found = [made[i] if i in made else self._kept[key] for i, key in enumerate(keys)]
        device = self.cropper.device
        low, *fine = (
            torch.stack([each.to(device).float() for each in part])
            for part in zip(*found, strict=True)
        )
        return low, fine[0] if fine else None

    def _keep(self, key: tuple[int, int, int], made: list[Tensor]) -> list[Tensor]:
        half = [x.clamp(-_LIMIT, _LIMIT).half() for x in made]
        size = sum(x.numel() * 2 for x in half)
        if size <= self._left:
            self._left -= size
            # In the machine's memory, which is larger than a GPU's.
            self._kept[key] = [x.cpu() for x in half]
        return half

    @torch.no_grad()
    def compute(self, images: Tensor) -> Tensor:
        """Features float32 of ``images``; for a backbone of one size, stitched from its tiles."""
        fixed = self.backbone.fixed_size
        if fixed is not None and tuple(images.shape[-2:]) != tuple(fixed):
            rows = [self._join_columns(row, fixed[1]) for row in images.split(fixed[0], 2)]
            return torch.cat(rows, 2)
        with autocast(images.device, self.dtype):
            return self.backbone(images).float()

    def _join_columns(self, row: Tensor, width: int) -> Tensor:
        return torch.cat([self.compute(tile) for tile in row.split(width, 3)], 3)
