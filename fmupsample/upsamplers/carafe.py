"""CARAFE, content-aware reassembly of features.

Wang et al., "CARAFE: Content-Aware ReAssembly of FEatures" (ICCV 2019). A 1x1 convolution
compresses the features, a k x k convolution predicts K x K scores for each of the r x r pixels of a
cell, and their softmax weighs the cells around it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.layers.norms import convolved
from fmupsample.upsamplers.base import NeighbourUpsampler
from fmupsample.upsamplers.complexity import Size, per_place
from fmupsample.upsamplers.config import Config
from fmupsample.upsamplers.learned import LearnedUpsampler
from fmupsample.upsamplers.neighbours import BORDERS, neighbour_softmax


@dataclass(frozen=True)
class CARAFEConfig(Config):
    """Shape of a CARAFE; the defaults are the paper's."""

    ratio: int = 2  # r
    kernel_size: int = 5  # K, odd
    compressed: int = 64  # channels that the scores are predicted from
    encoder_kernel_size: int = 3  # k, odd
    border: str = "masked"  # "masked", or "zeros" as in the official code

    def __post_init__(self) -> None:
        self.require_odd("kernel_size")
        self.require_odd("encoder_kernel_size")
        self.require_positive("ratio", "compressed")
        self.require_one_of("border", BORDERS)


class CARAFE(LearnedUpsampler, NeighbourUpsampler):
    """Upsample ``[B, C, h, w]`` exactly r times, without guidance.

    Args:
        config: see there. With ``border="zeros"`` weights do not sum to 1 at the border.
    """

    name: ClassVar[str] = "carafe"
    fixed_ratio = 2

    def __init__(self, config: CARAFEConfig) -> None:
        super().__init__(config)
        c = config
        self.fixed_ratio = c.ratio
        self.linear_in_value = c.border == "masked"
        self.compress = nn.Conv2d(c.channels, c.compressed, 1)
        k, scores = c.encoder_kernel_size, c.ratio**2 * c.kernel_size**2
        self.encode = nn.Conv2d(c.compressed, scores, k, padding=k // 2)
        nn.init.xavier_uniform_(self.compress.weight)
        nn.init.normal_(self.encode.weight, std=0.001)
        nn.init.zeros_(self.compress.bias)
        nn.init.zeros_(self.encode.bias)

    def predict(self, x: Tensor, guidance: Tensor | None, size: tuple[int, int]) -> Tensor:
        """Kernel weights ``[B, K*K, H, W]``."""
        c = self.config
        scores = F.pixel_shuffle(convolved(convolved(x, self.compress), self.encode), c.ratio)
        weights = neighbour_softmax(scores, tuple(x.shape[2:]), c.border)
        return weights[:, :, : size[0], : size[1]]

    def macs(self, channels: int, cells: Size, pixels: Size) -> tuple[int, int]:
        """(C m + k^2 m r^2 K^2) LR + K^2 C HR."""
        convolution = per_place(self.compress, self.encode) * prod(cells)
        return convolution, self.config.kernel_size**2 * channels * prod(pixels)
