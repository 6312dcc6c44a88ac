"""A2U, affinity-aware upsampling: kernels from second-order features of the encoder.

Dai et al., "Learning Affinity-Aware Upsampling for Deep Image Matting" (CVPR 2021). Two dynamic
k x k convolutions U and V (their taps come from the pooled map itself) turn the encoder's map e
into two maps of half its size, whose inner product over channels is an affinity; a dynamic vector p
turns that number into a kernel for every pixel:

    a = <phi(U e), phi(V e)> / sqrt(E),   phi = leaky ReLU of GroupNorm
    up(x): w = softmax(sigmoid(p a)),     K x K cells around a pixel
    down(e): w = softmax(p' a),           2K x 2K pixels around a cell
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from decoders.indexnet import made_even, require_size
from fmupsample.errors import ShapeError
from fmupsample.layers.moments import largest_group_count
from fmupsample.upsamplers.base import NeighbourUpsampler
from fmupsample.upsamplers.complexity import Size, per_place
from fmupsample.upsamplers.config import Config
from fmupsample.upsamplers.neighbours import BORDERS, neighbour_softmax
from fmupsample.upsamplers.official.filling import fill, renamed, required

_OFFICIAL_NAMES = {
    "bnu.0": "norm_u",
    "bnv.0": "norm_v",
    "bconv_UP.1": "up_vector",
    "bconv_DP.1": "down_vector",
    "bconv_U.1": "taps_u",
    "bconv_V.1": "taps_v",
}


@dataclass(frozen=True)
class A2UConfig(Config):
    """Shape of an A2U."""

    guidance_channels: int | None = None  # E, of the encoder's map; None: those of the features
    kernel_size: int = 3  # K, odd, at least 3
    encoder_kernel_size: int = 5  # k, odd
    shared: bool = True  # U and V have the same taps for all channels
    border: str = "masked"  # "masked", or "zeros" as in the official code

    def __post_init__(self) -> None:
        self.require_odd("kernel_size")
        self.require_odd("encoder_kernel_size")
        self.require_one_of("border", BORDERS)
        if self.guidance_channels is None:
            object.__setattr__(self, "guidance_channels", self.channels)


class A2U(NeighbourUpsampler):
    """Upsample ``[B, C, h, w]`` exactly twice by kernels from an encoder's map.

    In an encoder-decoder, call :meth:`downsample` instead of pooling and :meth:`reassemble` with
    the weights it gave; ``up(x, guidance)`` does the second half from the encoder's map.
    """

    name: ClassVar[str] = "a2u"
    needs_guidance: ClassVar[bool] = True
    fixed_ratio = 2
    guidance_is_image = False

    def __init__(self, config: A2UConfig) -> None:
        super().__init__()
        self.config = c = config
        self.linear_in_value = c.border == "masked"
        channels, taps = c.guidance_channels, 4 * c.kernel_size**2
        maps = 1 if c.shared else channels
        self.norm_u = nn.GroupNorm(largest_group_count(channels), channels)
        self.norm_v = nn.GroupNorm(largest_group_count(channels), channels)
        self.taps_u = nn.Conv2d(channels, maps, 1)
        self.taps_v = nn.Conv2d(channels, maps, 1)
        self.up_vector = nn.Conv2d(channels, taps, 1)
        self.down_vector = nn.Conv2d(channels, taps, 1)

    def macs(self, channels: int, cells: Size, pixels: Size) -> tuple[int, int]:
        """Two dynamic k x k convolutions and their product at LR, K^2 C HR of reassembly."""
        c, lr, k = self.config, prod(cells), self.config.kernel_size**2
        g, taps = c.guidance_channels, c.encoder_kernel_size**2
        # What makes the taps and the vector does not grow with the map; the down vector is the
        # encoder's.
        convolution = per_place(self.taps_u, self.taps_v) * taps + per_place(self.up_vector)
        return convolution + 2 * taps * g * lr, (g + 4 * k) * lr + k * channels * prod(pixels)

    def affinity(self, encoder: Tensor) -> Tensor:
        """``a``: ``[B, 1, ceil(H/2), ceil(W/2)]``."""
        if encoder.shape[1] != self.config.guidance_channels:
            raise ShapeError(
                f"this {self.name} looks at {self.config.guidance_channels} channels of an "
                f"encoder, got {encoder.shape[1]}"
            )
        encoder = made_even(encoder)
        sides = []
        for layer, norm in ((self.taps_u, self.norm_u), (self.taps_v, self.norm_v)):
            sides.append(F.leaky_relu(norm(self._dynamic(encoder, layer))))
        product = (sides[0] * sides[1]).sum(1, keepdim=True)
        return product / self.config.guidance_channels**0.5

    def _dynamic(self, encoder: Tensor, layer: nn.Conv2d) -> Tensor:
        """Each sample's own depthwise convolution, stride 2: one grouped convolution for all."""
        batch, channels, height, width = encoder.shape
        k = self.config.encoder_kernel_size
        taps = layer(F.adaptive_avg_pool2d(encoder, k)).expand(batch, channels, k, k)
        found = F.conv2d(
            encoder.reshape(1, batch * channels, height, width),
            taps.reshape(batch * channels, 1, k, k),
            stride=2, padding=k // 2, groups=batch * channels,
        )  # fmt: skip
        return found.reshape(batch, channels, height // 2, width // 2)

    def kernels(
        self, x: Tensor, guidance: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Kernel weights ``[B, K*K, H, W]``; they depend on the guidance alone."""
        size = self.check(x, guidance, size)
        assert guidance is not None  # checked above: needs_guidance
        require_size(self.name, guidance, size)
        if x.shape[1] != self.config.channels:
            raise ShapeError(
                f"this {self.name} was built for {self.config.channels} channels, got {x.shape[1]}"
            )
        return self._up_weights(guidance, self.affinity(guidance))

    def _up_weights(self, encoder: Tensor, affinity: Tensor) -> Tensor:
        vector = self.up_vector(F.adaptive_avg_pool2d(made_even(encoder), 1))
        scores = F.pixel_shuffle(vector * affinity, 2).sigmoid()
        weights = neighbour_softmax(scores, tuple(affinity.shape[2:]), self.config.border)
        return weights[:, :, : encoder.shape[2], : encoder.shape[3]]

    def downsample(self, encoder: Tensor) -> tuple[Tensor, Tensor]:
        """Pool ``[B, E, H, W]`` by its affinities.

        Returns:
            ``[B, E, ceil(H/2), ceil(W/2)]``, and the decoder's weights ``[B, K*K, H, W]``.
        """
        affinity = self.affinity(encoder)
        even = made_even(encoder)
        vector = self.down_vector(F.adaptive_avg_pool2d(even, 1))
        scores = vector * affinity  # [B, (2K)^2, h, w]
        window = 2 * self.config.kernel_size
        patches = _windows(even, window)  # [B, E, (2K)^2, h, w]
        if self.config.border == "masked":
            there = _windows(even.new_ones(1, 1, *even.shape[2:]), window)[:, 0]
            scores = scores.masked_fill(there == 0, float("-inf"))
        pooled = (patches * scores.softmax(1)[:, None]).sum(2)
        return pooled, self._up_weights(encoder, affinity)


def _windows(x: Tensor, size: int) -> Tensor:
    """``size x size`` pixels around every 2 x 2 block, zeros outside: ``[B, C, size^2, h, w]``."""
    batch, channels, height, width = x.shape
    patches = F.unfold(x, size, padding=size // 2 - 1, stride=2)
    return patches.reshape(batch, channels, size * size, height // 2, width // 2)


def load_official(
    state: dict[str, Tensor], *, encode_kernel_size: int = 5, channels: int | None = None
) -> A2U:
    """The module with the authors' parameters, of one group, and with their borders.

    Args:
        state: the official parameter names and tensors.
        channels: of the features, where they are not those of the encoder's map.
    """
    what = "official A2U parameters"
    state = renamed(state, _OFFICIAL_NAMES)
    taps, guidance = required(state, "up_vector.weight", what).shape[:2]
    config = A2UConfig(
        channels=guidance if channels is None else channels,
        guidance_channels=guidance,
        kernel_size=round((taps / 4) ** 0.5),
        encoder_kernel_size=encode_kernel_size,
        shared=len(required(state, "taps_u.weight", what)) == 1,
        border="zeros",
    )
    return fill(A2U(config), state, what)
