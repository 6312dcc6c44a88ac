"""Guided filter upsampling: edges of the picture, without training."""

from __future__ import annotations

from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fmupsample.errors import UsageError
from fmupsample.layers.filters import box_mean
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.complexity import BILINEAR, Size


class GuidedFilter(Upsampler):
    """Fast guided filter, He et al. (2013), He & Sun (2015), with all channels of the guide.

    In each window of LR cells the features are fitted as an affine function of the guidance (its
    means over the cells), ``x = a^T I + b``; the fits of the windows over a cell are averaged,
    upsampled bilinearly, and applied to the guidance at full resolution. Unlike in methods of
    weighted neighbours the result may leave the range of the features. Sizes of one cell are
    constant.

    Args:
        radius: of the windows, in LR cells.
        eps: added to the guide's variances, in squared units of the guide; larger is smoother.
    """

    name: ClassVar[str] = "guided"
    needs_guidance: ClassVar[bool] = True
    uses_ops: ClassVar[bool] = False

    def __init__(self, radius: int = 1, eps: float = 0.1) -> None:
        super().__init__()
        if radius < 1 or eps <= 0:
            raise UsageError(f"guided: radius and eps must be positive, not {radius} and {eps}")
        self.radius = radius
        self.eps = eps

    def macs(self, channels: int, cells: Size, pixels: Size) -> tuple[int, int]:
        """Three slopes and an offset are fitted per cell, enlarged, and applied."""
        c, lr, hr = channels, prod(cells), prod(pixels)
        return 0, (3 * c + 9 + 9 * c) * lr + (4 * BILINEAR * c + 3 * c) * hr

    def options(self) -> dict[str, Any]:
        return {"radius": self.radius, "eps": self.eps}

    def kernels(
        self, x: Tensor, guidance: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> Tensor:
        """The guide ``[B, G, H, W]``: with it the method is linear (and affine) in its values."""
        size = self.check(x, guidance, size)
        assert guidance is not None  # checked above: needs_guidance
        guidance = guidance.to(torch.promote_types(x.dtype, torch.float32))
        if tuple(guidance.shape[2:]) != size:
            guidance = F.interpolate(
                guidance, size, mode="bilinear", align_corners=False, antialias=True
            )
        return guidance

    def reassemble(self, weights: Tensor, value: Tensor) -> Tensor:
        """``value`` ``[B, V, h, w]`` filtered under the guide ``weights``."""
        guide = weights.to(torch.promote_types(value.dtype, torch.float32))
        target = value.to(guide.dtype)
        slopes, offset = self._fit(F.adaptive_avg_pool2d(guide, value.shape[2:]), target)
        out = self._enlarged(offset, guide)
        for g in range(guide.shape[1]):
            out = out + self._enlarged(slopes[:, g], guide) * guide[:, g, None]
        return out.to(value.dtype)

    def _enlarged(self, x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)

    def _fit(self, guide: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Slopes ``[B, G, V, h, w]`` and offsets ``[B, V, h, w]``, averaged over windows."""

        def mean(x: Tensor) -> Tensor:  # [B, ..., h, w]
            return box_mean(x.flatten(1, -3), self.radius).unflatten(1, x.shape[1:-2])

        count = guide.shape[1]
        centre = target.mean((2, 3), keepdim=True)  # of no influence but on rounding
        target = target - centre
        mean_g, mean_t = mean(guide), mean(target)
        cross = mean(guide[:, :, None] * target[:, None]) - mean_g[:, :, None] * mean_t[:, None]
        spread = mean(guide[:, :, None] * guide[:, None]) - mean_g[:, :, None] * mean_g[:, None]
        spread = spread.movedim((1, 2), (3, 4)) + self.eps * torch.eye(count).to(guide)
        slopes = torch.linalg.solve(spread, cross.movedim((1, 2), (3, 4)))  # [B, h, w, G, V]
        slopes = slopes.movedim((3, 4), (1, 2))
        offset = mean_t - (slopes * mean_g[:, :, None]).sum(1)
        return mean(slopes), mean(offset) + centre
