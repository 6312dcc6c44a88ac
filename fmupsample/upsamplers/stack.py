"""Stacks: operators of one fixed ratio, one after another, up to any size.

An operator that doubles reaches 16 in four stages. Other ratios (14, or sizes that are no
multiples) are the next larger stack's result, resized bilinearly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar

from torch import Tensor, nn

from fmupsample.errors import UsageError
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.carafe import CARAFE, CARAFEConfig
from fmupsample.upsamplers.complexity import BILINEAR, Size, per_place
from fmupsample.upsamplers.config import Config
from fmupsample.upsamplers.convolution import (
    Deconvolution,
    DeconvolutionConfig,
    PixelShuffle,
    PixelShuffleConfig,
)
from fmupsample.upsamplers.dysample import DySample, DySampleConfig
from fmupsample.upsamplers.featup import LearnedBilateral, LearnedBilateralConfig
from fmupsample.upsamplers.neighbours import resized


@dataclass(frozen=True)
class StackConfig(Config):
    """How many stages of what; each stage has parameters of its own."""

    stages: int = 4
    operator: dict[str, Any] = field(default_factory=dict)  # options of each stage's operator

    def __post_init__(self) -> None:
        if not isinstance(self.stages, int) or not 1 <= self.stages <= 6:
            raise UsageError(f"StackConfig: stages must be 1 to 6, not {self.stages}")
        if not isinstance(self.operator, Mapping):
            raise UsageError("StackConfig: operator is a mapping of options")


class Stack(Upsampler):
    """``config.stages`` operators; a guidance is resized to each one's output.

    Later stages' kernels come from earlier stages' results: not linear in the values, even where
    one stage is. Stages that are not needed for a size (an earlier one's result is as large) are
    left out, so that a stack never makes a map more than its ratio larger than what is asked for.
    """

    operator: ClassVar[type[Upsampler]]
    operator_config: ClassVar[type[Config]]
    linear_in_value = False

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.config = config
        options = {"channels": config.channels, **config.operator}
        self.stages = nn.ModuleList(
            self.operator(self.operator_config.from_dict(options)) for _ in range(config.stages)
        )
        self.guidance_is_image = all(stage.guidance_is_image for stage in self.stages)

    def forward(
        self, x: Tensor, guidance: Tensor | None = None, *, size: tuple[int, int] | None = None
    ) -> Tensor:
        size = self.check(x, guidance, size)
        out = x
        for stage, _, target in self._used((x.shape[2], x.shape[3]), size):
            shown = _averaged(guidance, target) if self.needs_guidance else None
            out = stage(out, shown, size=target)
        return resized(self.finished(out), size)

    def _used(self, cells: Size, pixels: Size) -> Iterator[tuple[Upsampler, Size, Size]]:
        """The stages that these sizes need, each with the size of its input and its output."""
        for stage in self.stages:
            if cells[0] >= pixels[0] and cells[1] >= pixels[1]:
                break
            larger = (cells[0] * stage.fixed_ratio, cells[1] * stage.fixed_ratio)
            yield stage, cells, larger
            cells = larger

    def macs(self, channels: int, cells: Size, pixels: Size) -> tuple[int, int]:
        """The stages that these sizes need, and what is left of the ratio."""
        convolution, neighbours, size = 0, 0, cells
        for stage, here, size in self._used(cells, pixels):
            more = stage.macs(channels, here, size)
            convolution, neighbours = convolution + more[0], neighbours + more[1]
        convolution += self.finishing_macs * prod(size)
        left = 0 if size == pixels else BILINEAR * channels * prod(pixels)
        return convolution, neighbours + left

    @property
    def finishing_macs(self) -> int:
        """Multiply-adds of :meth:`finished` for each pixel."""
        return 0

    def finished(self, x: Tensor) -> Tensor:
        """The last stage's result, before it is resized."""
        return x


def _averaged(guidance: Tensor, size: tuple[int, int]) -> Tensor:
    """The means of the guidance over the pixels of a smaller map; bilinear, where it is larger."""
    if guidance.shape[2] >= size[0] and guidance.shape[3] >= size[1]:
        return nn.functional.adaptive_avg_pool2d(guidance, size)
    return resized(guidance, size)


class CARAFEStack(Stack):
    """CARAFE, stage by stage."""

    name: ClassVar[str] = "carafe"
    operator, operator_config = CARAFE, CARAFEConfig


class DySampleStack(Stack):
    """DySample, stage by stage."""

    name: ClassVar[str] = "dysample"
    operator, operator_config = DySample, DySampleConfig
    uses_ops: ClassVar[bool] = False


class DeconvolutionStack(Stack):
    """Deconvolutions, stage by stage."""

    name: ClassVar[str] = "deconvolution"
    operator, operator_config = Deconvolution, DeconvolutionConfig
    uses_ops: ClassVar[bool] = False


class PixelShuffleStack(Stack):
    """Sub-pixel convolutions, stage by stage."""

    name: ClassVar[str] = "pixel-shuffle"
    operator, operator_config = PixelShuffle, PixelShuffleConfig
    uses_ops: ClassVar[bool] = False


class LearnedBilateralStack(Stack):
    """FeatUp's upsampler: learned joint bilateral stages, and a small correction of the result."""

    name: ClassVar[str] = "featup"
    operator, operator_config = LearnedBilateral, LearnedBilateralConfig
    needs_guidance: ClassVar[bool] = True

    def __init__(self, config: StackConfig) -> None:
        super().__init__(config)
        self.correct = nn.Conv2d(config.channels, config.channels, 1)

    @property
    def finishing_macs(self) -> int:
        return per_place(self.correct)

    def finished(self, x: Tensor) -> Tensor:
        dropped = nn.functional.dropout2d(x, 0.2, self.training)
        weight, bias = self.correct.weight.to(x), self.correct.bias.to(x)
        return x + 0.1 * nn.functional.conv2d(dropped, weight, bias)
