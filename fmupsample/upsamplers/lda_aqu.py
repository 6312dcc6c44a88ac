"""LDA-AQU: local self-attention with learned deformation of the neighbours, without guidance.

Du et al., "LDA-AQU: Adaptive Query-guided Upsampling via Local Deformable Attention" (ACM MM 2024).
With x' = LN(x), queries ``q = up(Pq x')`` (bilinear) and keys ``k = Pk x'``, a pixel P looks at K x
K places ``P + d + range tanh(offset_d(q))`` of the map and averages the features there:

    w_d = softmax_d(q(P)^T (k(place_d) + b_d) / sqrt(channels of a head))

The offsets come from a small convolutional net on the queries, one for each group of channels; b is
a learned bias on the keys; heads and groups split the channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fmupsample.errors import ShapeError, UsageError
from fmupsample.layers.chunks import recorded
from fmupsample.layers.norms import ChannelNorm, convolved
from fmupsample.layers.sampling import pixel_grid, sample, sample_with_zeros
from fmupsample.upsamplers.complexity import BILINEAR, Size, per_place
from fmupsample.upsamplers.config import Config
from fmupsample.upsamplers.learned import LearnedUpsampler

MODES = ("fixed", "official")


@dataclass(frozen=True)
class LDAAQUConfig(Config):
    """Shape and switches of an LDA-AQU.

    Lengths are in LR cells, so that they fit any ratio, and by default those of the paper at ratio
    2; but in output pixels in the official mode, as in the authors' code.
    """

    reduction: int = 4  # queries and keys have C / reduction channels
    kernel_size: int = 3  # K, odd
    offset_kernel_size: int = 3  # of the last convolution to the offsets, odd
    heads: int = 1
    groups: int = 1  # with offsets of their own; the official default is 2
    spacing: float | None = None  # between neighbours before deformation; None: 0.5, official 1
    reach: float | None = None  # of the deformation along either axis; None: 5.5, official 11
    bias: bool = True  # on the keys, per neighbour
    mode: str = "fixed"  # "fixed", or "official": see LDAAQU

    def __post_init__(self) -> None:
        self.require_odd("kernel_size")
        self.require_odd("offset_kernel_size")
        self.require_one_of("mode", MODES)
        pixels = 2 if self.mode == "official" else 1
        for name, value in (("spacing", 0.5), ("reach", 5.5)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, pixels * value)
        self.require_positive("reduction", "heads", "groups", "spacing", "reach")
        if self.channels % self.reduction:
            raise UsageError(
                f"LDAAQUConfig: channels={self.channels} must be a multiple of "
                f"reduction={self.reduction}"
            )
        for name in ("heads", "groups"):
            if self.hidden % getattr(self, name):
                raise UsageError(
                    f"LDAAQUConfig: channels / reduction = {self.hidden} must be a multiple of "
                    f"{name}={getattr(self, name)}"
                )

    @property
    def hidden(self) -> int:
        return self.channels // self.reduction


class LDAAQU(LearnedUpsampler):
    """Upsample ``[B, C, h, w]`` at any ratio >= 1; a guidance says the size at most.

    Two modes. ``official`` repeats the authors' code: coordinates with aligned corners, zeros
    beyond the border with their share of the softmax, and a division by ``H - 1``, which one-pixel
    sizes are refused for. ``fixed`` has the pixels where all other methods have them; samples
    beyond the border are the border's, and places outside the picture are left out of the softmax
    (unless all are), so that results stay in the range of the features.

    With one head and one group the method is linear in its values; more of them treat channels
    differently, and only maps of C channels can be reassembled. Neighbours are visited one after
    another: no map of ``K*K`` times the features is made (in training neither; samples are taken
    again in the backward pass).
    """

    name: ClassVar[str] = "lda-aqu"
    uses_ops: ClassVar[bool] = False  # the neighbours lie on no grid

    def __init__(self, config: LDAAQUConfig) -> None:
        super().__init__(config)
        c = config
        self.linear_in_value = c.mode == "fixed" and c.heads == c.groups == 1
        own = c.hidden // c.groups
        self.norm = ChannelNorm(c.channels)
        self.query = nn.Conv2d(c.channels, c.hidden, 1, bias=False)
        self.key = nn.Conv2d(c.channels, c.hidden, 1, bias=False)
        self.offset_depthwise = nn.Conv2d(own, own, 3, padding=1, groups=own, bias=False)
        self.offset_norm = ChannelNorm(own)
        e = c.offset_kernel_size
        self.offset = nn.Conv2d(own, 2 * c.kernel_size**2, e, padding=e // 2)
        self.key_bias = None
        if c.bias:
            shape = (c.heads, c.kernel_size**2, c.hidden // c.heads)
            self.key_bias = nn.Parameter(torch.empty(shape))
            nn.init.trunc_normal_(self.key_bias, std=0.02)
        for layer in (self.query, self.key, self.offset_depthwise):
            nn.init.xavier_uniform_(layer.weight)
        # In the beginning the neighbours are where they would be without deformation.
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def macs(self, channels: int, cells: Size, pixels: Size) -> tuple[int, int]:
        """Projections at LR; offsets, and K^2 samples of keys and features, at HR."""
        c, hr, k = self.config, prod(pixels), self.config.kernel_size**2
        convolution = per_place(self.query, self.key) * prod(cells)
        convolution += c.groups * per_place(self.offset_depthwise, self.offset) * hr
        return convolution, k * (1 + BILINEAR) * (c.hidden + channels) * hr

    def check(
        self, x: Tensor, guidance: Tensor | None, size: tuple[int, int] | None
    ) -> tuple[int, int]:
        size = super().check(x, guidance, size)
        if self.config.mode == "official" and 1 in size:
            raise ShapeError(
                f"{self.name}: the official mode cannot make one-pixel sizes, here "
                f"{size[0]}x{size[1]}; the fixed mode can"
            )
        return size

    def predict(self, x: Tensor, guidance: Tensor | None, size: tuple[int, int]) -> Tensor:
        """Weights and places: ``[B, (heads + 2 groups) K*K, H, W]``.

        First the weights ``[heads, K*K]``, which sum to 1 over the neighbours; then the places
        ``[groups, K*K, 2]``, x and y from where the pixel lies, in cells (official mode: pixels).
        """
        normal, aligned = self.norm(x), self.config.mode == "official"
        query = F.interpolate(
            convolved(normal, self.query), size=size, mode="bilinear", align_corners=aligned
        )
        places = self._places(query)  # [B, groups, K*K, 2, H, W]
        weights = self._weights(query, convolved(normal, self.key), places)
        return torch.cat([weights.flatten(1, 2), places.flatten(1, 3)], 1)

    def reassemble(self, weights: Tensor, value: Tensor) -> Tensor:
        """Weighted samples of ``value`` ``[B, V, h, w]`` at the places in ``weights``.

        Raises:
            ShapeError: V is not C although there are several heads or groups.
        """
        c = self.config
        if max(c.heads, c.groups) > 1 and value.shape[1] != c.channels:
            raise ShapeError(
                f"{self.name} with {c.heads} heads and {c.groups} groups reassembles maps of "
                f"{c.channels} channels, got {value.shape[1]}"
            )
        shares, places = self._unpacked(weights)
        total = torch.zeros((), dtype=value.dtype, device=value.device)
        for n in range(c.kernel_size**2):
            given = (value, shares[:, :, n], places[:, :, n])
            if recorded(*given):
                part = checkpoint(self._neighbour, *given, use_reentrant=False)
            else:
                part = self._neighbour(*given)
            total = total + part
        return total

    def _neighbour(self, value: Tensor, shares: Tensor, places: Tensor) -> Tensor:
        """One neighbour's part: shares ``[B, heads, H, W]``, places ``[B, groups, 2, H, W]``."""
        found = self._sampled(value, places)
        return (found.unflatten(1, (shares.shape[1], -1)) * shares[:, :, None].to(found)).flatten(
            1, 2
        )

    def _sampled(self, value: Tensor, places: Tensor) -> Tensor:
        """``[B, V, h, w]`` at ``[B, groups, 2, H, W]`` -> ``[B, V, H, W]``."""
        groups, size = places.shape[1], tuple(places.shape[-2:])
        grouped = value.reshape(-1, value.shape[1] // groups, *value.shape[2:])
        dtype = torch.promote_types(value.dtype, torch.float32)
        offset = places.flatten(0, 1).movedim(1, -1).to(dtype)  # [B groups, H, W, 2]
        if self.config.mode == "official":
            found = sample_with_zeros(grouped, _aligned(offset, tuple(value.shape[2:])))
        else:
            found = sample(grouped, pixel_grid(tuple(value.shape[2:]), size, offset) + offset)
        return found.unflatten(0, (value.shape[0], groups)).flatten(1, 2)

    def _places(self, query: Tensor) -> Tensor:
        c = self.config
        grouped = query.reshape(-1, c.hidden // c.groups, *query.shape[2:])
        hidden = F.gelu(self.offset_norm(convolved(grouped, self.offset_depthwise)))
        moved = convolved(hidden, self.offset).tanh() * c.reach
        moved = moved.unflatten(1, (-1, 2)).flip(2)  # rows before columns in the parameters
        reach = c.kernel_size // 2
        steps = torch.arange(-reach, reach + 1, device=query.device).to(query) * c.spacing
        y, x = torch.meshgrid(steps, steps, indexing="ij")
        base = torch.stack([x.flatten(), y.flatten()], 1)[:, :, None, None]  # [K*K, 2, 1, 1]
        return (moved + base).unflatten(0, (query.shape[0], c.groups))

    def _weights(self, query: Tensor, key: Tensor, places: Tensor) -> Tensor:
        """``[B, heads, K*K, H, W]``."""
        c = self.config
        query = query.unflatten(1, (c.heads, -1)) * (c.hidden // c.heads) ** -0.5
        scores = []
        for n in range(c.kernel_size**2):
            near = self._sampled(key, places[:, :, n]).unflatten(1, (c.heads, -1))
            if self.key_bias is not None:
                near = near + self.key_bias[:, n, :, None, None].to(near)
            scores.append((query * near).sum(2))
        scores = torch.stack(scores, 2)
        if c.mode == "fixed":
            scores = self._without_outside(scores, places, tuple(key.shape[2:]))
        return scores.softmax(2)

    def _without_outside(self, scores: Tensor, places: Tensor, cells: tuple[int, int]) -> Tensor:
        """The lowest finite score where a place is outside the picture for any group of a head."""
        c = self.config
        offset = places.detach().movedim(3, -1)  # [B, groups, K*K, H, W, 2]
        positions = pixel_grid(cells, tuple(scores.shape[-2:]), offset) + offset
        last = positions.new_tensor([cells[1] - 0.5, cells[0] - 0.5])
        outside = ((positions < -0.5) | (positions > last)).any(-1)  # [B, groups, K*K, H, W]
        if c.heads == c.groups:
            mask = outside
        elif c.heads > c.groups and c.heads % c.groups == 0:
            mask = outside.repeat_interleave(c.heads // c.groups, 1)
        else:  # a head reads the channels of several groups
            mask = outside.all(1, keepdim=True)
        # Finite: where all are outside, they are the border's, and share equally.
        return scores.masked_fill(mask, torch.finfo(scores.dtype).min)

    def _unpacked(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        count = c.kernel_size**2
        shares, places = weights.split([c.heads * count, 2 * c.groups * count], 1)
        return shares.unflatten(1, (c.heads, count)), places.unflatten(1, (c.groups, count, 2))


def _aligned(offset: Tensor, cells: tuple[int, int]) -> Tensor:
    """Pixels and offsets from them, ``[B, H, W, 2]``, in cells: both ends of an axis coincide."""
    size = tuple(offset.shape[1:3])
    y, x = torch.meshgrid(*(torch.arange(n).to(offset) for n in size), indexing="ij")
    scale = [(m - 1) / (n - 1) for m, n in zip(cells, size, strict=True)]
    return (offset + torch.stack([x, y], -1)) * offset.new_tensor(scale[::-1])
