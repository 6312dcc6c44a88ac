"""The part that methods with aligned queries share, from the guidance to two pairs of maps.

A pair is a query for every pixel and a key for every neighbour, to be compared. *Semantic* pair:
keys are made of the features, and queries of the guidance, filtered under the guidance towards the
keys so that both speak of the same. *Detail* pair: both are made of the guidance.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn

from fmupsample.errors import ShapeError
from fmupsample.layers.filters import fast_guided_filter, upsampled_on_half_grid
from fmupsample.layers.moments import largest_group_count, pointwise_after_norm
from fmupsample.layers.parts import InParts, in_parts
from fmupsample.upsamplers.aligned.config import AlignedConfig
from fmupsample.upsamplers.aligned.workspace import Workspace
from fmupsample.upsamplers.base import NeighbourUpsampler
from fmupsample.upsamplers.complexity import Size, per_place
from fmupsample.upsamplers.guidance import GuidanceStem
from fmupsample.upsamplers.neighbours import resized
from fmupsample.upsamplers.normalisation import Renormalisation
from fmupsample.upsamplers.prior import Prior


class AlignedUpsampler(NeighbourUpsampler, ABC):
    """Upsample features ``[B, C, h, w]`` under a guidance map, at any ratio >= 1.

    With a stem the guidance is the normalised picture ``[B, 3, H, W]`` (end-to-end form); without,
    any map ``[B, G, H, W]`` (decoder form). Where ``size`` differs from the guidance's size, the
    guidance is resized first. Scores are computed in float32 (float64 for float64 features).

    A subclass has a module ``semantic_scores`` and ``detail_scores`` for each pair it uses.
    """

    needs_guidance: ClassVar[bool] = True

    def __init__(self, config: AlignedConfig, *, stem: bool) -> None:
        super().__init__()
        self.config = config
        self.kernel_size = config.kernel_size
        self.guidance_is_image = stem
        self.renormalise = Renormalisation()
        guidance = config.guidance_channels
        self.stem = GuidanceStem(guidance) if stem else None
        self.guidance_norm = nn.GroupNorm(largest_group_count(guidance), guidance)
        self.query = nn.Conv2d(guidance, config.embedding, 1)

    def learn_keys(self) -> None:
        """Make the keys of the features by a 1x1 convolution."""
        channels = self.config.channels
        self.feature_norm = nn.GroupNorm(largest_group_count(channels), channels)
        self.key = nn.Conv2d(channels, self.config.embedding, 1)

    # -- what a subclass says ---------------------------------------------------------------------

    @abstractmethod
    def prior(self, guidance: Tensor | InParts, cells: Size) -> Prior:
        """For a map with this guidance ``[B, G, H, W]``, before the stem."""

    @abstractmethod
    def semantic(self, query: Tensor, key: Tensor, workspace: Workspace) -> Tensor:
        """Scores ``[B, K*K, H, W]``: aligned queries ``[B, E, H, W]``, keys ``[B, E, h, w]``."""

    @abstractmethod
    def detail(self, query: Tensor, cells: Size, workspace: Workspace) -> Tensor:
        """Scores ``[B, K*K, H, W]`` of queries ``[B, E, H, W]`` with keys made of them."""

    @abstractmethod
    def bands(
        self, x: Tensor, guidance: InParts, size: Size, pixels: int, workspace: Workspace
    ) -> Iterator[Tensor]:
        """:meth:`kernels` in bands of rows, of prepared arguments."""

    # -- what is the same for all -----------------------------------------------------------------

    def macs(self, channels: int, cells: Size, pixels: Size) -> tuple[int, int]:
        """Queries and keys; what compares each pair at HR; fine or whole cells reassembled."""
        c, hr = self.config, prod(pixels)
        pairs = [m for name, m in self.named_children() if name.endswith("_scores")]
        convolution = per_place(self.stem, self.query, *pairs) * hr
        if c.semantic:
            convolution += channels * c.embedding * prod(cells)
        # Fine-grained neighbours touch one more cell in each direction.
        side = c.kernel_size + (self.neighbours == "fine")
        neighbours = side**2 * channels * hr
        if not per_place(*pairs):
            neighbours += len(pairs) * c.kernel_size**2 * c.embedding * hr
        return convolution, neighbours

    def kernels(
        self, x: Tensor, guidance: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Kernel weights ``[B, K*K, H, W]``; zero where a neighbour lies outside the picture."""
        size = self.check(x, guidance, size)
        with torch.autocast(x.device.type, enabled=False):
            x, guidance, workspace = self._prepared(x, guidance, size)
            return self._kernels(x, guidance[...], workspace)

    def kernels_in_rows(
        self, x: Tensor, guidance: Tensor | InParts | None, size: tuple[int, int], pixels: int
    ) -> Iterator[Tensor]:
        if guidance is None or len(x) * size[0] * size[1] <= pixels:
            yield from super().kernels_in_rows(x, guidance, size, pixels)
            return
        guidance = in_parts(guidance)
        size = self.check(x, guidance.like, size)
        with torch.no_grad():
            features, guidance, workspace = self._prepared(x, guidance, size)
        yield from self.bands(features, guidance, size, pixels // len(x), workspace)

    def low_key(self, x: Tensor) -> Tensor:
        """Keys of the semantic pair, ``[B, E, h, w]``, of features ``[B, C, h, w]``."""
        return pointwise_after_norm(x, self.feature_norm, self.key.weight.flatten(1), self.key.bias)

    def queries(self, guidance: Tensor, moments: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """``[B, E, H, W]`` of a guidance after the stem.

        ``moments``: of the guidance of the whole map, where this is a window of it.
        """
        weight = self.query.weight.flatten(1)
        return pointwise_after_norm(guidance, self.guidance_norm, weight, self.query.bias, moments)

    def through_stem(self, guidance: Tensor) -> Tensor:
        return guidance if self.stem is None else self.stem(guidance)

    def _prepared(
        self, x: Tensor, guidance: Tensor | InParts, size: tuple[int, int]
    ) -> tuple[Tensor, InParts, Workspace]:
        """Features and guidance as they are computed with, and how."""
        self._check_channels(x, guidance)
        dtype = torch.promote_types(x.dtype, torch.float32)
        if guidance.shape[-2:] != size:
            guidance = resized(guidance[...].to(dtype), size)
        guidance = in_parts(guidance).then(partial(self.renormalise, dtype=dtype), dtype)
        return x.to(dtype), guidance, Workspace(low_precision=x.dtype == torch.bfloat16)

    def _check_channels(self, x: Tensor, guidance: Tensor | InParts) -> None:
        c = self.config
        if c.channels not in (0, x.shape[1]):
            raise ShapeError(
                f"this {self.name} was built for {c.channels} channels, got {x.shape[1]}"
            )
        expected = c.guidance_channels if self.stem is None else 3
        if guidance.shape[1] != expected:
            what = "a guidance map" if self.stem is None else "the normalised picture"
            raise ShapeError(
                f"this {self.name} takes {what} with {expected} channels, got {guidance.shape[1]}"
            )

    def _kernels(self, x: Tensor, guidance: Tensor, workspace: Workspace) -> Tensor:
        c, cells = self.config, (x.shape[2], x.shape[3])
        prior = self.prior(guidance, cells)
        query = self.queries(self.through_stem(guidance))
        scores = None
        if c.semantic:
            key = self.low_key(x)
            scores = self.semantic(self._aligned(query, key), key, workspace)
        if c.detail:
            detail = self.detail(query, cells, workspace)
            scores = detail if scores is None else scores.add_(detail)
        return prior.add(scores).softmax(1)

    def _aligned(self, query: Tensor, key: Tensor) -> Tensor:
        c, size = self.config, (query.shape[2], query.shape[3])
        if not c.align:
            return query
        # The radius counts output pixels; the filter works on a grid of half the size.
        target = upsampled_on_half_grid(key, size)
        return fast_guided_filter(query, target, c.guided_radius // 2, c.guided_eps)
