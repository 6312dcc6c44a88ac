"""Learned joint bilateral upsampling, in FeatUp's form.

Fu et al., "FeatUp: A Model-Agnostic Framework for Features at Any Resolution" (ICLR 2024). Each
stage doubles the size. The features are upsampled bicubically, and every pixel averages the K x K
pixels around it, weighted by likeness of learned projections of the picture and by distance:

    w = softmax(exp(t) <p(P), p(P + d)>) * exp(-|d|^2 / 2 sigma^2),   divided by its sum,
    w <- w + 0.1 net(w, picture)

with t, sigma, p and net learned, and d counted so that the K x K window spans -1..1.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.layers.norms import convolved
from fmupsample.ops import reassemble, similarity
from fmupsample.upsamplers.complexity import BICUBIC, Size, per_place
from fmupsample.upsamplers.config import Config
from fmupsample.upsamplers.learned import LearnedUpsampler


@dataclass(frozen=True)
class LearnedBilateralConfig(Config):
    """Shape and switches of one stage; the defaults are FeatUp's."""

    guidance_channels: int = 3  # G: of the picture, or of another map
    kernel_size: int = 7  # K, odd
    embedding: int = 32  # channels of the projections
    correction: bool = True  # add the net; without it weights are convex
    dropout: float = 0.1

    def __post_init__(self) -> None:
        self.require_odd("kernel_size")
        self.require_positive("guidance_channels", "embedding")


class LearnedBilateral(LearnedUpsampler):
    """One stage: upsample ``[B, C, h, w]`` exactly twice under a guidance map.

    Kernels depend on the guidance alone, and sum to 1 without the correction.
    Borders are mirrored, as in FeatUp; outputs too small for that have their border replicated.
    """

    name: ClassVar[str] = "jbu-stage"
    needs_guidance: ClassVar[bool] = True
    fixed_ratio = 2

    def __init__(self, config: LearnedBilateralConfig) -> None:
        super().__init__(config)
        c = config
        self.guidance_is_image = c.guidance_channels == 3
        self.linear_in_value = not c.correction
        self.temperature = nn.Parameter(torch.zeros(()))
        self.sigma = nn.Parameter(torch.ones(()))
        self.project = self._two_layers(c.guidance_channels, c.embedding)
        count = c.kernel_size**2
        self.correct = self._two_layers(c.guidance_channels + count, count)
        if not c.correction:
            self.correct = None

    def _two_layers(self, channels: int, out: int) -> nn.ModuleList:
        return nn.ModuleList([nn.Conv2d(channels, out, 1), nn.Conv2d(out, out, 1)])

    def _through(self, x: Tensor, layers: nn.ModuleList) -> Tensor:
        hidden = F.gelu(convolved(x, layers[0]))
        return convolved(F.dropout2d(hidden, self.config.dropout, self.training), layers[1])

    def predict(self, x: Tensor, guidance: Tensor | None, size: tuple[int, int]) -> Tensor:
        """Kernel weights ``[B, K*K, H, W]`` of pixels of the bicubically upsampled map."""
        c, reach = self.config, self.config.kernel_size // 2
        projected = self._through(guidance, self.project)
        around = _extended(projected, reach)
        # Queries beyond the border are not used; the operator wants as many as keys.
        queries = F.pad(projected, (reach,) * 4)
        scores = similarity(queries, around, c.kernel_size, fractional=False)
        scores = scores[:, :, reach : reach + size[0], reach : reach + size[1]]
        temperature = self.temperature.to(scores).exp().clamp(1e-4, 1e4)
        weights = (temperature * scores).softmax(1) * self._distance(scores)
        weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-7)
        if self.correct is not None:
            both = torch.cat([weights, guidance], 1)
            weights = weights + 0.1 * self._through(both, self.correct)
        return weights

    def _distance(self, like: Tensor) -> Tensor:
        """``[K*K, 1, 1]``."""
        steps = torch.linspace(-1, 1, self.config.kernel_size, dtype=torch.float64).to(like)
        squares = steps[:, None].square() + steps.square()
        if self.config.kernel_size == 1:
            squares = torch.zeros_like(squares)
        return torch.exp(-squares / (2 * self.sigma.to(like) ** 2)).flatten()[:, None, None]

    def reassemble(self, weights: Tensor, value: Tensor) -> Tensor:
        """Weighted pixels of the bicubically upsampled ``value`` ``[B, V, h, w]``."""
        height, width = weights.shape[2:]
        full = tuple(2 * n for n in value.shape[2:])
        fine = F.interpolate(value, size=full, mode="bicubic", align_corners=False)
        reach = self.config.kernel_size // 2
        around = _extended(fine[:, :, :height, :width], reach)
        shares = F.pad(weights, (reach,) * 4)
        found = reassemble(around, shares, fractional=False)
        return found[:, :, reach : reach + height, reach : reach + width]

    def macs(self, channels: int, cells: Size, pixels: Size) -> tuple[int, int]:
        """Everything at HR: projections, K^2 similarities, the correcting net, reassembly."""
        k, hr = self.config.kernel_size**2, prod(pixels)
        neighbours = k * (self.config.embedding + channels) + BICUBIC * channels
        return per_place(self.project, self.correct) * hr, neighbours * hr


def _extended(x: Tensor, reach: int) -> Tensor:
    mode = "reflect" if min(x.shape[2:]) > reach else "replicate"
    return F.pad(x, (reach,) * 4, mode=mode)
