"""What heads for any backbone share that weigh whole cells under the guidance of the image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fmupsample.errors import ShapeError
from fmupsample.layers.parts import InParts, in_parts
from fmupsample.upsamplers.base import NeighbourUpsampler
from fmupsample.upsamplers.normalisation import Renormalisation


class UniversalUpsampler(NeighbourUpsampler):
    """Takes the normalised image ``[B, 3, H, W]`` of any backbone, and re-assembles K x K cells."""

    needs_guidance: ClassVar[bool] = True
    neighbours: str = "coarse"

    def __init__(self) -> None:
        super().__init__()
        self.renormalise = Renormalisation()

    def use_with(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.renormalise.set(mean, std)

    def check(
        self, x: Tensor, guidance: Tensor | None, size: tuple[int, int] | None
    ) -> tuple[int, int]:
        size = super().check(x, guidance, size)
        if guidance is not None and guidance.shape[1] != 3:
            raise ShapeError(
                f"{self.name} takes the normalised picture with 3 channels, got {guidance.shape[1]}"
            )
        return size

    def _renormalised(self, x: Tensor, image: Tensor | InParts) -> InParts:
        """The image as the head wants it, in the dtype that features ``x`` are computed in."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return in_parts(image).then(partial(self.renormalise, dtype=dtype), dtype)
