"""ReSFU, the refreshed similarity-based upsampler.

Zhou et al., "A Refreshed Similarity-based Upsampler for Direct High-Ratio Feature Upsampling"
(2024). Every output pixel compares its query with the keys of K x K neighbours, one LR cell apart,
and averages their features with the softmax of those scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.layers.filters import gaussian3
from fmupsample.layers.moments import affine, apply_affine, group_moments, upsampled_group_moments
from fmupsample.layers.parts import InParts
from fmupsample.ops.grid import interpolation_matrix
from fmupsample.upsamplers.aligned.module import AlignedUpsampler
from fmupsample.upsamplers.aligned.workspace import Workspace
from fmupsample.upsamplers.prior import Prior
from fmupsample.upsamplers.resfu.config import ReSFUConfig
from fmupsample.upsamplers.resfu.keys import neighbour_stride
from fmupsample.upsamplers.resfu.scores import PairedCDC
from fmupsample.upsamplers.resfu.windows import WindowedDifferences


class ReSFU(AlignedUpsampler):
    """Upsample features ``[B, C, h, w]`` under a guidance map, at any ratio >= 1.

    With ``config.stem`` the guidance is the normalised picture ``[B, 3, H, W]`` (end-to-end form);
    without, any map ``[B, G, H, W]`` (decoder form). With bfloat16 features on a CPU the two
    convolutions before their last norm multiply in bfloat16, unless gradients are wanted.
    """

    name: ClassVar[str] = "resfu"

    def __init__(self, config: ReSFUConfig) -> None:
        super().__init__(config, stem=config.stem)
        self.neighbours = config.neighbours
        if config.semantic:
            self.learn_keys()
        for pair in ("semantic", "detail"):
            if getattr(config, pair):
                self.add_module(f"{pair}_scores", self._similarity())

    def _similarity(self) -> nn.Module:
        c = self.config
        if c.similarity == "inner":
            return nn.GroupNorm(c.norm_groups, c.embedding)
        return PairedCDC(c.embedding, c.middle, c.groups, c.norm_groups, c.kernel_size)

    def prior(self, guidance: Tensor | InParts, cells: tuple[int, int]) -> Prior:
        """Nothing is known but that neighbours outside the picture do not count."""
        size = (guidance.shape[-2], guidance.shape[-1])
        return Prior(self.config.kernel_size, cells, size)

    def semantic(self, query: Tensor, key: Tensor, workspace: Workspace) -> Tensor:
        size, scores = query.shape[-2:], self.semantic_scores
        moments = upsampled_group_moments(key, size, self.config.norm_groups)
        if self.config.similarity == "inner":
            key = apply_affine(key, *affine(scores, *moments))
            return self._inner(query, scores, self._upsampled_neighbours(key, size))
        return scores(scores.upsampled_keys(key, moments, size), query, workspace)

    def detail(self, query: Tensor, cells: tuple[int, int], workspace: Workspace) -> Tensor:
        c, scores = self.config, self.detail_scores
        key = gaussian3(query) if c.align else query
        moments = group_moments(key, c.norm_groups)
        stride = neighbour_stride(query.shape[-2:], cells)
        if c.similarity == "inner":
            key = apply_affine(key, *affine(scores, *moments))
            return self._inner(query, scores, self._neighbours(key, stride))
        return scores(scores.full_keys(key, moments, stride), query, workspace)

    def bands(
        self, x: Tensor, guidance: InParts, size: tuple[int, int], pixels: int, workspace: Workspace
    ) -> Iterator[Tensor]:
        if self.config.similarity == "inner":  # an ablation, and only of small pictures
            yield torch.no_grad()(self._kernels)(x, guidance[...], workspace)
            return
        yield from WindowedDifferences(self, x, guidance, size, pixels, workspace).bands()

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
