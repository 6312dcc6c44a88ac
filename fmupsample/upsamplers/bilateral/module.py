"""Bilateral cells: learned joint bilateral upsampling of whole cells, for any backbone or for one.

A pixel averages the K x K whole cells around it. A cell's weight falls with its distance from the
pixel in four spaces: place and colour, as in joint bilateral upsampling (Kopf et al. 2007), and the
two pairs of :mod:`~fmupsample.upsamplers.aligned.module`, features and guidance, where the squared
differences of normalised queries and keys have learned weights, a few dozen numbers each.

Queries are aligned with the features as in ReSFU (Zhou et al. 2024), from which this grew; neither
its paired central differences nor its fine-grained neighbours are here. Paired differences belong
to an offset: where a pixel's own cell ends another cell takes the offset's score, and whole cells
show as a mosaic. A distance belongs to a cell, and with the tapering prior there are no seams.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from fmupsample.layers.parts import InParts
from fmupsample.upsamplers.aligned.module import AlignedUpsampler
from fmupsample.upsamplers.aligned.workspace import Workspace
from fmupsample.upsamplers.bilateral.config import BilateralCellsConfig
from fmupsample.upsamplers.bilateral.distance import CellDistance
from fmupsample.upsamplers.bilateral.projection import Projection
from fmupsample.upsamplers.bilateral.windows import WindowedDistances
from fmupsample.upsamplers.prior import Prior


class BilateralCells(AlignedUpsampler):
    """Upsample features ``[B, C, h, w]`` under the normalised image ``[B, 3, H, W]``.

    With ``config.channels`` 0 they are those of any backbone.
    """

    name: ClassVar[str] = "bilateral-cells"
    neighbours: str = "coarse"
    # Trained with the colours of its prior, a head learns to argue with them.
    late: ClassVar[tuple[str, ...]] = ("sigma_range",)

    def __init__(self, config: BilateralCellsConfig) -> None:
        super().__init__(config, stem=True)
        c = config
        if c.semantic and c.keys == "projected":
            self.key = Projection(c.channels, c.embedding)
        elif c.semantic:
            self.learn_keys()
        for pair in ("semantic", "detail"):
            if getattr(c, pair):
                # The channels of a projection mean nothing.
                shared = pair == "semantic" and c.keys == "projected"
                scores = CellDistance(c.embedding, c.norm_groups, c.kernel_size, shared=shared)
                self.add_module(f"{pair}_scores", scores)

    def use_with(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take images normalised by ``mean`` and ``std``, RGB in 0..1.

        With projected keys, where the head may have been trained for other backbones, they are
        brought to ImageNet's; else they are taken as they are.
        """
        if self.config.keys == "projected":
            self.renormalise.set(mean, std)

    def specialised(self, channels: int) -> BilateralCells:
        """The same for features of so many channels, with a projection that can be trained.

        On the CPU; needs a head of any number of channels.
        """
        head = BilateralCells(replace(self.config, channels=channels))
        head.load_state_dict({**head.state_dict(), **self.state_dict()})
        return head

    def low_key(self, x: Tensor) -> Tensor:
        return self.key(x) if self.config.keys == "projected" else super().low_key(x)

    def prior(self, guidance: Tensor | InParts, cells: tuple[int, int]) -> Prior:
        c, size = self.config, (guidance.shape[-2], guidance.shape[-1])
        return Prior(
            c.kernel_size,
            cells,
            size,
            taper=c.taper,
            sigma_space=c.sigma_space,
            guidance=guidance,
            sigma_range=c.sigma_range,
        )

    def semantic(self, query: Tensor, key: Tensor, workspace: Workspace) -> Tensor:
        return self.semantic_scores(query, key, query.shape[-2:])

    def detail(self, query: Tensor, cells: tuple[int, int], workspace: Workspace) -> Tensor:
        return self.detail_scores(query, F.adaptive_avg_pool2d(query, cells), query.shape[-2:])

    def bands(
        self, x: Tensor, guidance: InParts, size: tuple[int, int], pixels: int, workspace: Workspace
    ) -> Iterator[Tensor]:
        yield from WindowedDistances(self, x, guidance, size, pixels).bands()
