"""Joint bilateral upsampling: edge-aware, without training."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from fmupsample.errors import UsageError
from fmupsample.layers.parts import InParts, in_parts
from fmupsample.upsamplers.base import NeighbourUpsampler
from fmupsample.upsamplers.complexity import Size
from fmupsample.upsamplers.neighbours import resized
from fmupsample.upsamplers.prior import Prior


class JointBilateral(NeighbourUpsampler):
    """Joint bilateral upsampling, Kopf et al. (2007).

    A pixel averages the K x K cells around the one it lies in, weighted by their distance and by
    how much the pixel's guidance differs from the cell's (the mean of the guidance over the cell).
    With the normalised picture as guidance it sharpens any features at colour edges.

    Args:
        kernel_size: K, odd.
        sigma_space: of the Gaussian on distance, in LR cells.
        sigma_range: of the Gaussian on guidance differences (Euclidean over the channels), in units
            of the guidance; for a normalised picture about 4.5 times units of RGB in 0..1.
    """

    name: ClassVar[str] = "jbu"
    needs_guidance: ClassVar[bool] = True
    neighbours: str = "coarse"
    bytes_per_pixel: ClassVar[int] = 500

    def __init__(
        self, kernel_size: int = 5, sigma_space: float = 0.75, sigma_range: float = 0.6
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise UsageError(f"jbu: kernel_size must be odd and positive, not {kernel_size}")
        if sigma_space <= 0 or sigma_range <= 0:
            raise UsageError("jbu: sigma_space and sigma_range must be positive")
        self.kernel_size = kernel_size
        self.sigma_space = sigma_space
        self.sigma_range = sigma_range

    def macs(self, channels: int, cells: Size, pixels: Size) -> tuple[int, int]:
        return 0, (3 + channels) * self.kernel_size**2 * prod(pixels)

    def options(self) -> dict[str, Any]:
        names = ("kernel_size", "sigma_space", "sigma_range")
        return {name: getattr(self, name) for name in names}

    def kernels(
        self, x: Tensor, guidance: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Weights ``[B, K*K, H, W]``; zero where a neighbour lies outside the picture."""
        size = self.check(x, guidance, size)
        return self._prior(x, guidance, size).weights()

    def kernels_in_rows(
        self, x: Tensor, guidance: Tensor | InParts | None, size: tuple[int, int], pixels: int
    ) -> Iterator[Tensor]:
        size = self.check(x, guidance if guidance is None else in_parts(guidance).like, size)
        prior = torch.no_grad()(self._prior)(x, guidance, size)
        step = max(1, pixels // (len(x) * size[1]))
        for first in range(0, size[0], step):
            rows = (slice(first, min(first + step, size[0])), slice(0, size[1]))
            yield torch.no_grad()(prior.weights)(rows)

    def _prior(self, x: Tensor, guidance: Tensor | InParts | None, size: tuple[int, int]) -> Prior:
        """Of the guidance at the output's size, in the precision that weights are computed in."""
        assert guidance is not None  # checked before: needs_guidance
        guidance = guidance.to(torch.promote_types(x.dtype, torch.float32))
        if tuple(guidance.shape[-2:]) != tuple(size):
            guidance = resized(guidance[...], size)
        return Prior(
            self.kernel_size,
            (x.shape[2], x.shape[3]),
            size,
            sigma_space=self.sigma_space,
            guidance=guidance,
            sigma_range=self.sigma_range,
        )
