"""FADE, fusing the assets of decoder and encoder.

Lu et al., "FADE: Fusing the Assets of Decoder and Encoder for Task-Agnostic Upsampling" (ECCV
2022). Kernels are predicted from the encoder's map and the features together, by one convolution
that both go through ("semi-shift": the features' part is the same for all pixels of a cell):

    w = softmax(conv(Pe guidance) + nearest(conv(Pd x)))

A gate from the features then chooses between the guidance itself, where detail is wanted, and the
reassembled features: ``g guidance + (1 - g) up(x)``, ``g = sigmoid(nearest(linear(x)))``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from torch import Tensor, nn

from fmupsample.errors import UsageError
from fmupsample.layers.norms import convolved
from fmupsample.upsamplers.base import NeighbourUpsampler
from fmupsample.upsamplers.complexity import Size, per_place
from fmupsample.upsamplers.config import Config
from fmupsample.upsamplers.guidance import guidance_map
from fmupsample.upsamplers.learned import LearnedUpsampler
from fmupsample.upsamplers.neighbours import BORDERS, in_cell, neighbour_softmax


@dataclass(frozen=True)
class FADEConfig(Config):
    """Shape and switches of a FADE; the defaults suit the end-to-end form.

    The decoder form of the paper is ``stem=False, gate=True, guidance_channels=C``.
    """

    guidance_channels: int = 16  # G
    stem: bool = True  # make the guidance from the picture (end-to-end form); else it is given
    gate: bool = False  # let the guidance through; it must have the channels of the features
    kernel_size: int = 5  # K, odd
    compressed: int = 64  # channels that the scores are predicted from
    encoder_kernel_size: int = 3  # of that convolution, odd
    lite: bool = False  # compress to K*K channels and convolve each on its own (FADE-Lite)
    border: str = "masked"  # "masked", or "zeros" as in the official code

    def __post_init__(self) -> None:
        self.require_odd("kernel_size")
        self.require_odd("encoder_kernel_size")
        self.require_positive("compressed", "guidance_channels")
        self.require_one_of("border", BORDERS)
        if self.gate and (self.stem or self.guidance_channels != self.channels):
            raise UsageError(
                "FADEConfig: the gate passes the guidance on, which must be a map of "
                f"{self.channels} channels (stem=False, guidance_channels={self.channels})"
            )


class FADE(LearnedUpsampler, NeighbourUpsampler):
    """Upsample ``[B, C, h, w]`` under a guidance map, at any ratio >= 1.

    The official code does ratio 2; nothing in the method asks for it. With the gate, the guidance
    flows into the result (``fuses_skip``), which is not linear in the features alone.
    """

    name: ClassVar[str] = "fade"
    needs_guidance: ClassVar[bool] = True

    def __init__(self, config: FADEConfig) -> None:
        super().__init__(config, stem=config.stem)
        c = config
        self.guidance_is_image = c.stem
        self.fuses_skip = c.gate
        self.linear_in_value = c.border == "masked" and not c.gate
        if self.linear_in_value:
            self.neighbours, self.kernel_size = "coarse", c.kernel_size
        scores, k = c.kernel_size**2, c.encoder_kernel_size
        middle, groups = (scores, scores) if c.lite else (c.compressed, 1)
        self.compress_guidance = nn.Conv2d(c.guidance_channels, middle, 1)
        self.compress_features = nn.Conv2d(c.channels, middle, 1, bias=False)
        self.encode = nn.Conv2d(middle, scores, k, padding=k // 2, groups=groups)
        self.gate = nn.Conv2d(c.channels, 1, 1) if c.gate else None
        for layer in (self.compress_guidance, self.compress_features, self.encode, self.gate):
            if layer is not None:
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(
        self, x: Tensor, guidance: Tensor | None = None, *, size: tuple[int, int] | None = None
    ) -> Tensor:
        upsampled = super().forward(x, guidance, size=size)
        if self.gate is None:
            return upsampled
        assert guidance is not None
        skip = guidance_map(guidance, tuple(upsampled.shape[2:]), None).to(upsampled)
        gate = in_cell(convolved(x, self.gate), tuple(upsampled.shape[2:])).sigmoid()
        return gate * skip + (1 - gate) * upsampled

    def predict(self, x: Tensor, guidance: Tensor | None, size: tuple[int, int]) -> Tensor:
        """Kernel weights ``[B, K*K, H, W]``."""
        scores = convolved(convolved(guidance, self.compress_guidance), self.encode)
        own = convolved(convolved(x, self.compress_features), self.encode)
        return neighbour_softmax(
            scores + in_cell(own, size), tuple(x.shape[2:]), self.config.border
        )

    def macs(self, channels: int, cells: Size, pixels: Size) -> tuple[int, int]:
        """Both maps compressed and convolved; K^2 C HR of reassembly, and the gate."""
        lr, hr, k = prod(cells), prod(pixels), self.config.kernel_size**2
        convolution = per_place(self.stem, self.compress_guidance, self.encode) * hr
        convolution += per_place(self.compress_features, self.encode, self.gate) * lr
        gate = 0 if self.gate is None else 2 * channels * hr
        return convolution, k * channels * hr + gate
