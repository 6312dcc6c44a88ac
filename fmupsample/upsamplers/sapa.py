"""SAPA, similarity-aware point affiliation.

Lu et al., "SAPA: Similarity-Aware Point Affiliation for Feature Upsampling" (NeurIPS 2022). A pixel
of the guidance y belongs to the K x K cells of the features x that it is similar to:

    w_d(P) = h(s_d(P)) / sum_e h(s_e(P)),    s_d(P) = <query(P), key(cell of P + d)>

With LayerNorm over the channels, y' = LN(y) and x' = LN(x), the similarity s is

* ``inner`` (SAPA-I): ``x'^T y'``, no parameters;
* ``bilinear`` (SAPA-B): ``(Px x')^T (Py y')``, low rank;
* ``gated`` (SAPA-G): ``g (Px x')^T (Pxy y') + (1 - g) (Px x')^T (Pxx x)``, where x on the query's
  side is the cell that holds the pixel and ``g = sigmoid(linear(x'))`` of that cell;
* ``addition``: the same without the gate, both terms counting fully.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.errors import UsageError
from fmupsample.layers.norms import ChannelNorm, convolved
from fmupsample.ops import similarity
from fmupsample.upsamplers.base import NeighbourUpsampler
from fmupsample.upsamplers.complexity import Size, per_place
from fmupsample.upsamplers.config import Config
from fmupsample.upsamplers.learned import LearnedUpsampler
from fmupsample.upsamplers.neighbours import BORDERS, in_cell, neighbour_softmax, outside

SIMILARITIES = ("inner", "bilinear", "gated", "addition")
NORMALISATIONS = ("exp", "relu", "sigmoid", "softplus", "none")
# Added to every weight before they are divided by their sum, which may be 0 (relu).
_FLOOR = 1e-6


@dataclass(frozen=True)
class SAPAConfig(Config):
    """Shape and switches of a SAPA."""

    guidance_channels: int | None = None  # G; None: 16, or C for "inner", which needs as many
    stem: bool = True  # make the guidance from the picture (end-to-end form); else it is given
    similarity: str = "gated"  # one of SIMILARITIES
    normalisation: str = "exp"  # h: one of NORMALISATIONS; "none" takes the scores as weights
    kernel_size: int = 5  # K, odd
    embedding: int = 32  # channels of queries and keys; not of "inner"
    norm: bool = True  # LayerNorm before the similarity
    border: str = "masked"  # "masked", or "zeros" as in the official code: see neighbours.py

    def __post_init__(self) -> None:
        self.require_odd("kernel_size")
        self.require_one_of("similarity", SIMILARITIES)
        self.require_one_of("normalisation", NORMALISATIONS)
        self.require_one_of("border", BORDERS)
        self.require_positive("embedding")
        if self.guidance_channels is None:
            inner = self.similarity == "inner"
            object.__setattr__(self, "guidance_channels", self.channels if inner else 16)
        if self.similarity == "inner" and self.guidance_channels != self.channels:
            raise UsageError(
                f"SAPAConfig: the inner product needs as many guidance channels as features have, "
                f"{self.channels}, not {self.guidance_channels}; use similarity='bilinear'"
            )


class SAPA(LearnedUpsampler, NeighbourUpsampler):
    """Upsample ``[B, C, h, w]`` under a guidance map, at any ratio >= 1.

    Weights sum to 1 but with ``border="zeros"`` or ``normalisation="none"``;
    those are not ``linear_in_value`` in the sense of the interface, although kernels exist.
    """

    name: ClassVar[str] = "sapa"
    needs_guidance: ClassVar[bool] = True

    def __init__(self, config: SAPAConfig) -> None:
        super().__init__(config, stem=config.stem)
        c = config
        self.guidance_is_image = c.stem
        self.linear_in_value = c.border == "masked" and c.normalisation != "none"
        if self.linear_in_value:
            self.neighbours, self.kernel_size = "coarse", c.kernel_size
        projected = c.similarity != "inner"
        # The inner product has no parameters: its norms have none either.
        self.guidance_norm = self._norm(c.guidance_channels, projected)
        self.feature_norm = self._norm(c.channels, projected)
        self.query = self.key = self.own_query = self.gate = None
        if projected:
            self.query = nn.Conv2d(c.guidance_channels, c.embedding, 1)
            self.key = nn.Conv2d(c.channels, c.embedding, 1)
        if c.similarity in ("gated", "addition"):
            self.own_query = nn.Conv2d(c.channels, c.embedding, 1)
        if c.similarity == "gated":
            self.gate = nn.Conv2d(c.channels, 1, 1)
        for layer in (self.query, self.key, self.own_query, self.gate):
            if layer is not None:
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def _norm(self, channels: int, affine: bool) -> nn.Module:
        return (
            ChannelNorm(channels, elementwise_affine=affine) if self.config.norm else nn.Identity()
        )

    def predict(self, x: Tensor, guidance: Tensor | None, size: tuple[int, int]) -> Tensor:
        """Kernel weights ``[B, K*K, H, W]``; zero where a neighbour lies outside the map."""
        return self._normalised(self._scores(x, guidance), tuple(x.shape[2:]))

    def _scores(self, x: Tensor, guidance: Tensor) -> Tensor:
        size, k = tuple(guidance.shape[2:]), self.config.kernel_size
        normal, query = self.feature_norm(x), self.guidance_norm(guidance)
        if self.query is None:
            return similarity(query, normal, k, fractional=False)
        key, query = convolved(normal, self.key), convolved(query, self.query)
        if self.own_query is None:
            return similarity(query, key, k, fractional=False)
        # The cell's own part of the query is the same for all its pixels: scored once per cell.
        own = similarity(convolved(x, self.own_query), key, k, fractional=False)
        if self.gate is None:
            return similarity(query, key, k, fractional=False) + in_cell(own, size)
        gate = convolved(normal, self.gate).sigmoid()
        query = query * in_cell(gate, size)
        return similarity(query, key, k, fractional=False) + in_cell(own * (1 - gate), size)

    def _normalised(self, scores: Tensor, cells: tuple[int, int]) -> Tensor:
        c = self.config
        if c.normalisation == "exp":
            return neighbour_softmax(scores, cells, c.border, zero_score=True)
        mask = outside(cells, tuple(scores.shape[2:]), c.kernel_size, scores.device)
        # A zero key's score is 0, as at the official border; elsewhere these are left out below.
        scores = scores.masked_fill(mask, 0)
        if c.normalisation == "none":
            return scores
        made = {"relu": F.relu, "sigmoid": torch.sigmoid, "softplus": F.softplus}
        weights = made[c.normalisation](scores) + _FLOOR
        if c.border == "masked":
            weights = weights.masked_fill(mask, 0)
        return (weights / weights.sum(1, keepdim=True)).masked_fill(mask, 0)

    def macs(self, channels: int, cells: Size, pixels: Size) -> tuple[int, int]:
        """inner: 2 K^2 C HR; else queries, keys and K^2 (E + C) HR; the cells' own part at LR."""
        c, lr, hr, k = self.config, prod(cells), prod(pixels), self.config.kernel_size**2
        convolution = per_place(self.stem, self.query) * hr
        convolution += per_place(self.key, self.own_query, self.gate) * lr
        compared = channels if self.query is None else c.embedding
        own = 0 if self.own_query is None else k * c.embedding * lr
        return convolution, k * (compared + channels) * hr + own
