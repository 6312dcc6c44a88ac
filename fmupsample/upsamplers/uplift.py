"""UPLiFT, Walmer et al., "UPLiFT: Efficient Pixel-Dense Feature Upsampling with Local Attenders".

One module doubles the size, again and again. An encoder describes the image once, at 16 pixels a
cell. At each step a decoder joins that to the features as they are so far, and makes a guide of
twice their size. From the guide every pixel gets weights of 17 of the 5 x 5 cells around its own:

    x . x . x
    . x x x .
    x x x x x
    . x x x .
    x . x . x

Outputs are means of features with weights that sum to 1; but later weights come from earlier
results, so the method is not linear in its values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.errors import UsageError
from fmupsample.layers.norms import convolved
from fmupsample.ops import reassemble
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.complexity import BILINEAR, Size, per_place
from fmupsample.upsamplers.config import Config
from fmupsample.upsamplers.guidance import check_channels

_PIXELS_PER_CELL = 16  # of the image that the encoder is given
_SIDE = 5
_PATTERN = ("x.x.x", ".xxx.", "xxxxx", ".xxx.", "x.x.x")
_CELLS = [i for i, mark in enumerate("".join(_PATTERN)) if mark == "x"]


@dataclass(frozen=True)
class UPLiFTConfig(Config):
    """Shape of an UPLiFT head for features of ``channels`` channels."""

    width: int = 16  # channels of the encoder: 1, 2, 4, 8 and 8 times as many, layer by layer
    guide: int = 64  # channels of the decoder
    stages: int = 4  # how often the size is doubled at most

    def __post_init__(self) -> None:
        self.require_positive("channels")
        self.require_counts("width", "guide")
        if not isinstance(self.stages, int) or not 1 <= self.stages <= 6:
            raise UsageError(f"UPLiFTConfig: stages must be 1 to 6, not {self.stages!r}")


class BatchNorm(nn.Module):
    """Batch normalisation; of ``nn.BatchNorm2d`` it lacks the count of batches."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(f(channels)) for f in (torch.ones, torch.zeros))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        tensors = (self.running_mean, self.running_var, self.weight, self.bias)
        return F.batch_norm(x, *(t.to(x) for t in tensors), training=self.training)


class Block(nn.Module):
    """3x3 convolutions with batch normalisation and ReLU, a 1x1 convolution, and a shortcut."""

    def __init__(self, inputs: int, channels: int, depth: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number in range(depth):
            first = inputs if number == 0 else channels
            layers += [
                nn.Conv2d(first, channels, 3, padding=1, bias=False),
                BatchNorm(channels),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        for layer in self.layers:
            x = convolved(x, layer) if isinstance(layer, nn.Conv2d) else layer(x)
        return _added(x, shortcut)


class UPLiFT(Upsampler):
    """Upsample features of the backbone that it was trained for.

    ``[B, C, h, w]`` and the normalised image ``[B, 3, H, W]`` -> ``[B, C, H, W]`` at any
    ratio >= 1: the size is doubled until it is large enough, and what is too large is resized.
    Computed in float32 (float64 for float64 features).
    """

    name: ClassVar[str] = "uplift"
    needs_guidance: ClassVar[bool] = True
    linear_in_value: bool = False

    def __init__(self, config: UPLiFTConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.width * n for n in (1, 2, 4, 8, 8)]
        self.encoder = nn.Sequential(
            *(Block(a, b, 1) for a, b in zip([3, *widths], widths, strict=False))
        )
        guide, skip = config.guide, widths[-1]
        self.coarse = Block(config.channels + skip, guide, 2)
        self.enlarge = nn.ConvTranspose2d(guide, guide, 2, stride=2)
        self.fine = Block(guide + skip, guide, 2)
        self.attend = nn.Conv2d(guide, len(_CELLS), 1)

    def macs(self, channels: int, cells: Size, pixels: Size) -> tuple[int, int]:
        """The encoder once; the decoder and 17 cells at each step; what is left of the ratio."""
        convolution = per_place(self.encoder) * prod(cells) * _PIXELS_PER_CELL**2
        neighbours, size = 0, cells
        for here, size in self._steps(cells, pixels):
            convolution += per_place(self.coarse, self.enlarge) * prod(here)
            convolution += per_place(self.fine, self.attend) * prod(size)
            neighbours += len(_CELLS) * channels * prod(size)
        left = 0 if size == pixels else BILINEAR * channels * prod(pixels)
        return convolution, neighbours + left

    def forward(
        self, x: Tensor, guidance: Tensor | None = None, *, size: tuple[int, int] | None = None
    ) -> Tensor:
        size = self.check(x, guidance, size)
        assert guidance is not None  # checked above: needs_guidance
        with torch.autocast(x.device.type, enabled=False):
            out = x.to(torch.promote_types(x.dtype, torch.float32))
            cells = (x.shape[2], x.shape[3])
            before = last = _resized(guidance.to(out), tuple(_PIXELS_PER_CELL * n for n in cells))
            for block in self.encoder:
                before, last = last, block(last)
            for here, larger in self._steps(cells, size):
                weights = self._weights(out, _nearest(last, here), _nearest(before, larger))
                out = reassemble(out, weights, fractional=False)
            return _resized(out, size).to(x.dtype)

    def check(
        self, x: Tensor, guidance: Tensor | None, size: tuple[int, int] | None
    ) -> tuple[int, int]:
        size = super().check(x, guidance, size)
        check_channels(self.name, x, self.config.channels, guidance, 3, stem=True)
        return size

    def _steps(self, cells: Size, pixels: Size) -> Iterator[tuple[Size, Size]]:
        """The sizes before and after each step that these need."""
        for _ in range(self.config.stages):
            if cells[0] >= pixels[0] and cells[1] >= pixels[1]:
                break
            larger = (2 * cells[0], 2 * cells[1])
            yield cells, larger
            cells = larger

    def _weights(self, x: Tensor, skip: Tensor, larger_skip: Tensor) -> Tensor:
        """``[B, 25, 2 h, 2 w]`` for features ``[B, C, h, w]``, given the encoder's maps."""
        guide = self.coarse(torch.cat([x, skip], 1))
        weight, bias = self.enlarge.weight.to(x), self.enlarge.bias.to(x)
        shortcut = F.interpolate(guide, scale_factor=2, mode="bilinear", align_corners=True)
        guide = F.conv_transpose2d(guide, weight, bias, stride=2) + shortcut
        guide = self.fine(torch.cat([guide, larger_skip], 1))
        found = _added(convolved(guide, self.attend), guide).softmax(1)
        b, _, height, width = found.shape
        index = torch.tensor(_CELLS, device=found.device)
        return found.new_zeros(b, _SIDE**2, height, width).index_copy(1, index, found)


def _added(x: Tensor, shortcut: Tensor) -> Tensor:
    """The sum of maps whose channels may differ in number: those of ``x``."""
    shortcut = shortcut[:, : x.shape[1]]
    return x + F.pad(shortcut, (0, 0, 0, 0, 0, x.shape[1] - shortcut.shape[1]))


def _nearest(x: Tensor, size: Size) -> Tensor:
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="nearest")


def _resized(x: Tensor, size: Size) -> Tensor:
    """Bilinear, and a mean over more pixels where it gets smaller."""
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size, mode="bilinear", antialias=True)
