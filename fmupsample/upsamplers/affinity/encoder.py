"""The guidance encoder: the first blocks of an EfficientNet-Lite, a top-down path, a fine stem.

Tan & Le (2019) and TensorFlow's "Lite" variant: inverted residuals with ReLU6 and no
squeeze-and-excitation. Batch norms are folded into the convolutions, so that each picture is
encoded alone and windows of a picture give what the whole gives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.layers.norms import convolved
from fmupsample.upsamplers.complexity import per_place

# Sides of what the encoder takes are multiples of this.
ALIGNMENT = 16
# Pixels around a pixel that its embedding depends on. By adding up kernels and strides: 74 down to
# 1/16, then 16 for the convolution there, and 16 + 8 + 8 + 4 + 4 + 2 + 2 on the way up, rounded up.
REACH = 144


class _Stage(NamedTuple):
    """An inverted residual: stride, depthwise kernel, channels in and out, expansion."""

    stride: int
    kernel: int
    inputs: int
    outputs: int
    expansion: int


STEM = 32
# EfficientNet-Lite0 up to its fourth group: 1/2, 1/4, 1/8 and 1/16 of the image.
STAGES = (
    _Stage(1, 3, 32, 16, 1),
    _Stage(2, 3, 16, 24, 6),
    _Stage(1, 3, 24, 24, 6),
    _Stage(2, 5, 24, 40, 6),
    _Stage(1, 5, 40, 40, 6),
    _Stage(2, 3, 40, 80, 6),
    _Stage(1, 3, 80, 80, 6),
    _Stage(1, 3, 80, 80, 6),
)


class _Halving:
    """Which side a convolution of stride 2 is padded on more: it takes turns.

    Padding on one side moves the grid by half a pixel of the finer level; taking turns keeps the
    levels over one another.
    """

    def __init__(self) -> None:
        self.left = False

    def pad(self, x: Tensor, kernel: int, stride: int) -> Tensor:
        reach = kernel // 2
        if stride == 1:
            return F.pad(x, (reach,) * 4)
        more, less = (reach, reach - 1) if self.left else (reach - 1, reach)
        self.left = not self.left
        return F.pad(x, (more, less, more, less))


class _Block(nn.Module):
    """An inverted residual block, its batch norms folded."""

    def __init__(self, stage: _Stage) -> None:
        super().__init__()
        self.stage = stage
        middle = stage.inputs * stage.expansion
        self.expand = nn.Conv2d(stage.inputs, middle, 1) if stage.expansion > 1 else None
        self.depthwise = nn.Conv2d(middle, middle, stage.kernel, stage.stride, groups=middle)
        self.project = nn.Conv2d(middle, stage.outputs, 1)

    def forward(self, x: Tensor, halving: _Halving) -> Tensor:
        stage = self.stage
        y = x if self.expand is None else F.relu6(convolved(x, self.expand))
        y = F.relu6(convolved(halving.pad(y, stage.kernel, stage.stride), self.depthwise))
        y = convolved(y, self.project)
        return x + y if stage.stride == 1 and stage.inputs == stage.outputs else y


class _Mix(nn.Module):
    """A residual depthwise-separable 3x3 convolution of the top-down path."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.expand = nn.Conv2d(width, 2 * width, 1)
        self.project = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(convolved(convolved(x, self.spatial), self.expand))
        return x + convolved(hidden, self.project)


class Encoder(nn.Module):
    """A normalised image ``[B, 3, H, W]`` -> embedding ``[B, outputs, H, W]``, same dtype.

    H and W are multiples of :data:`ALIGNMENT`.

    Args:
        outputs: channels of the embedding.
        width: of the top-down path; detail: of the two convolutions at full resolution.
    """

    def __init__(self, outputs: int, width: int, detail: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, STEM, 3, 2)
        self.blocks = nn.ModuleList(_Block(stage) for stage in STAGES)
        levels = [
            here.outputs
            for here, after in zip(STAGES, (*STAGES[1:], None), strict=True)
            if after is None or after.stride == 2
        ]  # 1/2 first
        self.side = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in levels)
        self.mix = nn.ModuleList(_Mix(width) for _ in levels)
        self.edges = nn.Conv2d(3, detail, 3)
        self.texture = nn.Conv2d(detail, detail, 3)
        self.from_coarse = nn.Conv2d(width, outputs, 1)
        self.from_fine = nn.Conv2d(detail, outputs, 1, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        coarse = None
        for x, side, mix in zip(*self._levels(image), strict=True):
            here = convolved(x, side)
            coarse = mix(here if coarse is None else here + _doubled(coarse))
        # A 1x1 convolution commutes with interpolation: it is done where there are fewer pixels.
        embedding = _doubled(convolved(coarse, self.from_coarse))
        padded = F.pad(image, (2, 2, 2, 2), mode="replicate")
        fine = convolved(F.gelu(convolved(padded, self.edges)), self.texture)
        return embedding + convolved(F.gelu(fine), self.from_fine)

    def macs(self, pixels: int) -> int:
        """Multiply-adds of an image of so many pixels."""
        here = pixels / 4
        total = per_place(self.stem) * here
        for block in self.blocks:
            total += per_place(block.expand) * here
            here /= block.stage.stride**2
            total += per_place(block.depthwise, block.project) * here
        for level, (side, mix) in enumerate(zip(self.side, self.mix, strict=True), 1):
            total += per_place(side, mix) * pixels / 4**level
        total += per_place(self.from_coarse) * pixels / 4
        return round(total + per_place(self.edges, self.texture, self.from_fine) * pixels)

    def _levels(self, image: Tensor) -> tuple[list[Tensor], list[nn.Module], list[nn.Module]]:
        """Maps of 1/16 to 1/2 and the modules that belong to them."""
        halving, found = _Halving(), []
        x = F.relu6(convolved(halving.pad(image, 3, 2), self.stem))
        for block in self.blocks:
            if block.stage.stride == 2:
                found.append(x)
            x = block(x, halving)
        found.append(x)
        return found[::-1], [*self.side][::-1], [*self.mix][::-1]


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
