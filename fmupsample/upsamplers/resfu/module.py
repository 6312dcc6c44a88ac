"""ReSFU, the refreshed similarity-based upsampler.

Zhou et al., "A Refreshed Similarity-based Upsampler for Direct High-Ratio Feature Upsampling"
(2024). Every output pixel compares its query with the keys of K x K neighbours, one LR cell apart,
and averages their features with the softmax of those scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.errors import ShapeError
from fmupsample.layers.filters import fast_guided_filter, gaussian3, upsampled_on_half_grid
from fmupsample.layers.moments import (
    affine,
    apply_affine,
    group_moments,
    largest_group_count,
    pointwise_after_norm,
    upsampled_group_moments,
)
from fmupsample.layers.parts import InParts, in_parts
from fmupsample.ops import reassemble, reassemble_at
from fmupsample.ops.grid import interpolation_matrix
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.complexity import Size, per_place
from fmupsample.upsamplers.normalisation import Renormalisation
from fmupsample.upsamplers.resfu.config import ReSFUConfig
from fmupsample.upsamplers.resfu.distance import CellDistance
from fmupsample.upsamplers.resfu.prior import Prior
from fmupsample.upsamplers.resfu.projection import Projection
from fmupsample.upsamplers.resfu.scores import PairedCDC, Workspace
from fmupsample.upsamplers.resfu.stem import GuidanceStem
from fmupsample.upsamplers.resfu.windows import (
    WindowedKernels,
    neighbour_stride,
    resized_guidance,
)

UNIVERSAL = "resfu-universal"  # the name of one that takes the features of any backbone


class ReSFU(Upsampler):
    """Upsample features ``[B, C, h, w]`` under a guidance map, at any ratio >= 1.

    With ``config.stem`` the guidance is the normalised picture ``[B, 3, H, W]`` (end-to-end form);
    without, any map ``[B, G, H, W]`` (decoder form). Where ``size`` differs from the guidance's
    size, the guidance is resized first.

    Scores are computed in float32 (float64 for float64 features). With bfloat16 features on a CPU
    the two convolutions before their last norm multiply in bfloat16, unless gradients are wanted.
    """

    name: ClassVar[str] = "resfu"
    needs_guidance: ClassVar[bool] = True

    def __init__(self, config: ReSFUConfig):
        super().__init__()
        self.config = config
        if config.channels == 0:
            self.name = UNIVERSAL
        self.renormalise = Renormalisation()  # see use_with
        self.neighbours, self.kernel_size = config.neighbours, config.kernel_size
        self.guidance_is_image = config.stem
        self.stem = GuidanceStem(config.guidance_channels) if config.stem else None
        guidance, channels, e = config.guidance_channels, config.channels, config.embedding
        self.guidance_norm = nn.GroupNorm(largest_group_count(guidance), guidance)
        self.query = nn.Conv2d(guidance, e, 1)
        if config.semantic and config.keys == "projected":
            self.key = Projection(channels, e)
        elif config.semantic:
            self.feature_norm = nn.GroupNorm(largest_group_count(channels), channels)
            self.key = nn.Conv2d(channels, e, 1)
        for pair in ("semantic", "detail"):
            if getattr(config, pair):
                self.add_module(f"{pair}_scores", self._similarity(pair))

    def _similarity(self, pair: str) -> nn.Module:
        c = self.config
        if c.similarity == "distance":
            # The channels of a projection mean nothing.
            shared = pair == "semantic" and c.keys == "projected"
            return CellDistance(c.embedding, c.norm_groups, c.kernel_size, shared=shared)
        if c.similarity == "inner":
            return nn.GroupNorm(c.norm_groups, c.embedding)
        scores = PairedCDC(c.embedding, c.middle, c.groups, c.norm_groups, c.kernel_size)
        if c.sigma_space is not None or c.taper:
            # Training starts at the prior: random preferences among whole cells are a mosaic, which
            # takes hundreds of steps to go away.
            nn.init.zeros_(scores.score.weight)
            nn.init.zeros_(scores.score.bias)
        return scores

    def macs(self, channels: int, cells: Size, pixels: Size) -> tuple[int, int]:
        """Queries and keys; per pair a K x K difference convolution, two 1x1; fine reassembly."""
        c, hr, k = self.config, prod(pixels), self.config.kernel_size**2
        pairs = [getattr(self, f"{p}_scores") for p in ("semantic", "detail") if getattr(c, p)]
        convolution = per_place(self.stem, self.query, *pairs) * hr
        if c.semantic:
            convolution += channels * c.embedding * prod(cells)
        neighbours = (c.kernel_size + 1) ** 2 * channels * hr
        if c.similarity != "pcdc":
            neighbours += len(pairs) * k * c.embedding * hr
        return convolution, neighbours

    def kernels(
        self, x: Tensor, guidance: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Kernel weights ``[B, K*K, H, W]``; zero where a neighbour lies outside the picture."""
        size = self.check(x, guidance, size)
        with torch.autocast(x.device.type, enabled=False):
            x, guidance, low = self._prepared(x, guidance, size)
            return self._kernels(x, guidance[...], low)

    def kernels_in_rows(
        self, x: Tensor, guidance: Tensor | InParts | None, size: tuple[int, int], pixels: int
    ) -> Iterator[Tensor]:
        few = len(x) * size[0] * size[1] <= pixels
        if guidance is None or self.config.similarity == "inner" or few:
            yield from super().kernels_in_rows(x, guidance, size, pixels)
            return
        guidance = in_parts(guidance)
        size = self.check(x, guidance.like, size)
        with torch.no_grad():
            features, guidance, low = self._prepared(x, guidance, size)
            job = WindowedKernels(self, features, guidance, size, pixels // len(x), low)
        job.measure()
        for band in job.windows:
            yield job.band(band)

    def reassemble(self, weights: Tensor, value: Tensor) -> Tensor:
        """Weighted fine-grained (or coarse) neighbours of ``value`` ``[B, V, h, w]``."""
        return reassemble(value, weights, fractional=self.config.neighbours == "fine")

    def reassemble_at(self, weights: Tensor, value: Tensor, pixels: Tensor) -> Tensor:
        fine = self.config.neighbours == "fine"
        return reassemble_at(value, weights, pixels, fractional=fine)

    def use_with(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take pictures normalised by ``mean`` and ``std``, RGB in 0..1.

        With ``keys="projected"``, where the head may have been trained for other backbones, they
        are brought to ImageNet's; else they are taken as they are.
        """
        if self.config.keys == "learned":
            return
        self.renormalise.set(mean, std)

    def _prepared(
        self, x: Tensor, guidance: Tensor | InParts, size: tuple[int, int]
    ) -> tuple[Tensor, InParts, bool]:
        """Features and guidance as they are computed with; whether products may be bfloat16."""
        self._check_channels(x, guidance)
        dtype = torch.promote_types(x.dtype, torch.float32)
        if guidance.shape[-2:] != size:
            guidance = resized_guidance(guidance[...].to(dtype), size)
        guidance = in_parts(guidance).then(partial(self.renormalise, dtype=dtype), dtype)
        return x.to(dtype), guidance, x.dtype == torch.bfloat16

    def specialised(self, channels: int) -> ReSFU:
        """The same for features of so many channels, with a projection that can be trained.

        On the CPU; needs a head of any number of channels.
        """
        head = ReSFU(self.config.specialised(channels))
        head.load_state_dict({**head.state_dict(), **self.state_dict()})
        return head

    def low_key(self, x: Tensor) -> Tensor:
        """Keys of the semantic pair, ``[B, E, h, w]``, of features ``[B, C, h, w]``."""
        if isinstance(self.key, Projection):
            return self.key(x)
        return pointwise_after_norm(x, self.feature_norm, self.key.weight.flatten(1), self.key.bias)

    def _check_channels(self, x: Tensor, guidance: Tensor | InParts) -> None:
        c = self.config
        if c.channels not in (0, x.shape[1]):
            raise ShapeError(f"this ReSFU was built for {c.channels} channels, got {x.shape[1]}")
        expected = 3 if c.stem else c.guidance_channels
        if guidance.shape[1] != expected:
            what = "the normalised picture" if c.stem else "a guidance map"
            raise ShapeError(
                f"this ReSFU takes {what} with {expected} channels, got {guidance.shape[1]}"
            )

    def _kernels(self, x: Tensor, guidance: Tensor, low: bool) -> Tensor:
        c = self.config
        prior = Prior(c, guidance, x.shape[-2:])
        if self.stem is not None:
            guidance = self.stem(guidance)
        query = pointwise_after_norm(
            guidance, self.guidance_norm, self.query.weight.flatten(1), self.query.bias
        )
        scores, workspace = None, Workspace()
        if c.semantic:
            scores = self._semantic(x, query, workspace, low)
        if c.detail:
            detail = self._detail(query, x.shape[-2:], workspace, low)
            scores = detail if scores is None else scores.add_(detail)
        return prior.add(scores).softmax(1)

    def _semantic(self, x: Tensor, query: Tensor, workspace: Workspace, low: bool) -> Tensor:
        c, size = self.config, query.shape[-2:]
        key = self.low_key(x)
        if c.align:
            # The radius counts output pixels; the filter works on a grid of half the size.
            query = fast_guided_filter(
                query, upsampled_on_half_grid(key, size), c.guided_radius // 2, c.guided_eps
            )
        if c.similarity == "distance":
            return self.semantic_scores(query, key, size)
        moments = upsampled_group_moments(key, size, c.norm_groups)
        if c.similarity == "inner":
            key = apply_affine(key, *affine(self.semantic_scores, *moments))
            return self._inner(query, self.semantic_scores, self._upsampled_neighbours(key, size))
        keys = self.semantic_scores.upsampled_keys(key, moments, size)
        return self.semantic_scores(keys, query, workspace, low_precision=low)

    def _detail(
        self, query: Tensor, cells: tuple[int, int], workspace: Workspace, low: bool
    ) -> Tensor:
        c = self.config
        if c.similarity == "distance":
            cell_means = F.adaptive_avg_pool2d(query, cells)
            return self.detail_scores(query, cell_means, query.shape[-2:])
        key = gaussian3(query) if c.align else query
        moments = group_moments(key, c.norm_groups)
        stride = neighbour_stride(query.shape[-2:], cells)
        if c.similarity == "inner":
            key = apply_affine(key, *affine(self.detail_scores, *moments))
            return self._inner(query, self.detail_scores, self._neighbours(key, stride))
        keys = self.detail_scores.full_keys(key, moments, stride)
        return self.detail_scores(keys, query, workspace, low_precision=low)

    def _inner(self, query: Tensor, norm: nn.GroupNorm, neighbours: list[Tensor]) -> Tensor:
        """Scaled inner products with each neighbour's key: the similarity PCDC replaces."""
        query = apply_affine(query, *affine(norm, *group_moments(query, norm.num_groups)))
        products = [(query * key).sum(1) for key in neighbours]
        return torch.stack(products, 1) / self.config.embedding**0.5

    def _neighbours(self, key: Tensor, stride: tuple[int, int]) -> list[Tensor]:
        height, width = key.shape[-2:]
        (sy, sx), reach = stride, self.config.kernel_size // 2
        pad = (sx * reach, sx * reach, sy * reach, sy * reach)
        padded = F.pad(key, pad, mode="replicate")
        steps = range(self.config.kernel_size)
        return [
            padded[:, :, i * sy : i * sy + height, j * sx : j * sx + width]
            for i in steps
            for j in steps
        ]

    def _upsampled_neighbours(self, key: Tensor, size: tuple[int, int]) -> list[Tensor]:
        h, w = key.shape[-2:]
        reach = self.config.kernel_size // 2
        pad = reach + 1
        padded = F.pad(key, (pad, pad, pad, pad), mode="replicate")
        uy = interpolation_matrix(h, size[0], padding=1).to(key)
        ux = interpolation_matrix(w, size[1], padding=1).to(key)
        steps = range(self.config.kernel_size)
        return [
            uy @ padded[:, :, i : i + h + 2, j : j + w + 2] @ ux.T for i in steps for j in steps
        ]
