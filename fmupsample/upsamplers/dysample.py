"""DySample: upsampling by resampling at positions that are learned, without kernels.

Liu et al., "Learning to Upsample by Learning to Sample" (ICCV 2023). Pixel P of the output is the
bilinear sample of the features at ``P + o(P)``: where bilinear upsampling has it, plus an offset
from one linear layer, for each group of channels. Offsets are small (a quarter of a cell for each
unit, or up to half with a dynamic *scope*, a second layer's sigmoid), so that they do not cross.

Styles: ``lp`` predicts the offsets of the r x r pixels of a cell from the cell, and shuffles;
``pl`` shuffles the features first and predicts at each pixel from C / r^2 channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.errors import ShapeError, UsageError
from fmupsample.layers.norms import convolved
from fmupsample.layers.sampling import pixel_grid, sample
from fmupsample.upsamplers.complexity import BILINEAR, Size, per_place
from fmupsample.upsamplers.config import Config
from fmupsample.upsamplers.learned import LearnedUpsampler


@dataclass(frozen=True)
class DySampleConfig(Config):
    """Shape and switches of a DySample."""

    ratio: int = 2  # r
    style: str = "lp"  # "lp" or "pl"
    groups: int = 4  # of channels, with offsets of their own
    dynamic_scope: bool = False

    def __post_init__(self) -> None:
        self.require_one_of("style", ("lp", "pl"))
        self.require_positive("ratio", "groups")
        if self.channels % self.groups:
            raise UsageError(f"DySampleConfig: groups={self.groups} must divide {self.channels}")
        if self.style == "pl" and self.channels % self.ratio**2:
            raise UsageError(
                f"DySampleConfig: style 'pl' needs channels that {self.ratio}^2 divides, not "
                f"{self.channels}"
            )


class DySample(LearnedUpsampler):
    """Upsample ``[B, C, h, w]`` exactly r times, without guidance.

    With one group the method is linear in its values: its kernels are the offsets.
    """

    name: ClassVar[str] = "dysample"
    fixed_ratio = 2
    uses_ops: ClassVar[bool] = False

    def __init__(self, config: DySampleConfig) -> None:
        super().__init__(config)
        c = config
        self.fixed_ratio = c.ratio
        self.linear_in_value = c.groups == 1
        pixels = c.ratio**2
        shape = (c.channels, 2 * c.groups * pixels)
        if c.style == "pl":
            shape = (c.channels // pixels, 2 * c.groups)
        self.offset = nn.Conv2d(*shape, 1)
        nn.init.normal_(self.offset.weight, std=0.001)
        nn.init.zeros_(self.offset.bias)
        self.scope = nn.Conv2d(*shape, 1, bias=False) if c.dynamic_scope else None
        if self.scope is not None:
            nn.init.zeros_(self.scope.weight)

    def predict(self, x: Tensor, guidance: Tensor | None, size: tuple[int, int]) -> Tensor:
        """Offsets in cells, ``[B, 2 * groups, H, W]``: all x, then all y."""
        c = self.config
        shuffled = c.style == "pl"
        x = F.pixel_shuffle(x, c.ratio) if shuffled else x
        offset = convolved(x, self.offset)
        if self.scope is None:
            offset = offset * 0.25
        else:
            offset = offset * convolved(x, self.scope).sigmoid() * 0.5
        if not shuffled:
            offset = F.pixel_shuffle(offset, c.ratio)
        return offset[:, :, : size[0], : size[1]]

    def reassemble(self, weights: Tensor, value: Tensor) -> Tensor:
        """Samples of ``value`` ``[B, V, h, w]`` at the offset positions; groups divide V.

        Raises:
            ShapeError: V is not C although there are several groups.
        """
        c, (h, w), (height, width) = self.config, value.shape[2:], weights.shape[2:]
        if c.groups > 1 and value.shape[1] != c.channels:
            raise ShapeError(
                f"{self.name} with {c.groups} groups reassembles maps of {c.channels} channels, "
                f"got {value.shape[1]}"
            )
        grouped = value.reshape(-1, value.shape[1] // c.groups, h, w)
        offset = weights.unflatten(1, (2, c.groups)).movedim(1, -1).flatten(0, 1)
        offset = offset.to(torch.promote_types(value.dtype, torch.float32))
        # The grid is that of the whole output, also where an odd size leaves its end out.
        grid = pixel_grid((h, w), (h * c.ratio, w * c.ratio), offset)[:height, :width]
        return sample(grouped, grid + offset).reshape(value.shape[0], -1, height, width)

    def macs(self, channels: int, cells: Size, pixels: Size) -> tuple[int, int]:
        """2 g C HR of offsets (r^2 less in the pl style), and a sample of C channels."""
        places = prod(cells) * (self.config.ratio**2 if self.config.style == "pl" else 1)
        return per_place(self.offset, self.scope) * places, BILINEAR * channels * prod(pixels)
