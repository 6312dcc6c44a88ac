"""Classes that the backbone makes itself: clusters of fine features, told from coarse ones.

Fine features, of an enlarged crop, fall into clusters by k-means. A linear classifier is fitted to
tell from a low-resolution cell which cluster its pixels are in, once, before the head is trained.
What the head has to do is to place the features so that this classifier, which has never seen an
upsampled feature, is right at every pixel. That is what a linear probe will ask of it. Comparing
the features themselves asks for more than the coarse ones know: the best mixtures of neighbours in
that sense probe no better than bilinear interpolation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fmupsample.ops.grid import interpolation_matrix
from fmupsample.training.regions import means_of_regions

# Of the fit, which is small: all of it takes seconds.
_ROUNDS = 15  # of k-means
_STEPS, _RATE, _DRAWN = 400, 3e-2, 2048  # of the classifier: steps, peak learning rate, pixels each


@dataclass(frozen=True)
class Clusters:
    """What :meth:`fit` found, for scaled features.

    Attributes:
        centres: ``[K, C]``, of fine features.
        weight, bias: ``[K, C]`` and ``[K]``, the classifier of low-resolution features.
    """

    centres: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, fine: Tensor, low: Tensor, count: int, seed: int = 0) -> Clusters:
        """From pixels' fine features and those of the cells they lie in, ``[N, C]`` each, scaled.

        No more clusters than a tenth of the pixels. Repeatable: the same on one machine.
        """
        generator = torch.Generator(fine.device).manual_seed(seed)
        count = max(1, min(count, len(fine) // 10))
        centres, members = _k_means(fine, count, generator)
        weight, bias = _fit_classifier(low, members, count, generator)
        return cls(centres, weight, bias)

    def logits(self, x: Tensor) -> Tensor:
        """The classifier on scaled features ``[B, C, h, w]``: ``[B, K, h, w]``."""
        return F.conv2d(x, self.weight[:, :, None, None], self.bias)

    def members(
        self,
        fine: Tensor,
        size: tuple[int, int],
        phase: Sequence[int],
        step: int,
        regions: Tensor | None = None,
        share: float = 0.0,
    ) -> Tensor:
        """The cluster of pixels: of ``fine`` ``[B, C, ...]``, scaled, upsampled bilinearly.

        Args:
            size: of the whole picture, pixels.
            phase, step: first row and column looked at, and how many pixels apart they are.
            regions: int64 ``[B, H', W']`` of these pixels, numbers unique over the batch: each
                pixel's feature is first drawn to the mean of its region, by ``share`` (0 to 1).

        Returns:
            int64 ``[B, H', W']``.
        """
        (y0, x0), (h, w) = phase, fine.shape[-2:]
        # The distance to a centre is affine in the features but for a part all centres share, and
        # interpolation and means keep that: distances are interpolated, not features.
        nearness = F.conv2d(fine, self.centres[:, :, None, None], -self._half_squares())
        down = interpolation_matrix(h, size[0])[y0::step].to(fine)
        across = interpolation_matrix(w, size[1])[x0::step].to(fine)
        nearness = down @ nearness @ across.T
        if regions is not None and share > 0:
            nearness = nearness.lerp(means_of_regions(nearness, regions), share)
        return nearness.argmax(1)

    def tensors(self) -> list[Tensor]:
        """What makes it, in the order of the constructor."""
        return [self.centres, self.weight, self.bias]

    def _half_squares(self) -> Tensor:
        return 0.5 * self.centres.square().sum(1)


def sample_pixels(
    fine: Tensor, low: Tensor, size: tuple[int, int], count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Features at random pixels of one crop, for :meth:`Clusters.fit`.

    Args:
        fine, low: ``[C, eh, ew]`` and ``[C, h, w]``; size: of the crop, pixels.

    Returns:
        ``[count, C]`` each: ``fine`` interpolated bilinearly, ``low`` of the cell the pixel is in.
    """
    rows, columns = (torch.randint(0, n, (count,), generator=generator) for n in size)
    down, across = (
        interpolation_matrix(cells, pixels)[drawn].to(fine)
        for cells, pixels, drawn in zip(fine.shape[-2:], size, (rows, columns), strict=True)
    )
    at_pixels = torch.einsum("ny,cyx,nx->nc", down, fine, across)
    (h, w), (height, width) = low.shape[-2:], size
    rows, columns = (rows * h // height).to(low.device), (columns * w // width).to(low.device)
    return at_pixels, low[:, rows, columns].T


def _k_means(x: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Centres ``[count, C]`` and members ``[N]`` of points ``[N, C]``."""
    centres = _seeds(x, count, generator)
    for round_ in range(_ROUNDS + 1):
        half = 0.5 * centres.square().sum(1)
        members = (x @ centres.T - half).argmax(1)
        if round_ == _ROUNDS:
            break
        sizes = torch.bincount(members, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, members, x)
        # A centre that nobody is nearest to stays.
        centres = torch.where(sizes[:, None] > 0, sums / sizes.clamp_min(1)[:, None], centres)
    return centres, members


def _seeds(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Points far apart: each drawn by its squared distance from those before (k-means++)."""
    chosen = [torch.randint(0, len(x), (), generator=generator, device=x.device)]
    distance = torch.full_like(x[:, 0], float("inf"))
    while len(chosen) < count:
        distance = torch.minimum(distance, (x - x[chosen[-1]]).square().sum(1))
        # Where all points have been taken, any will do.
        shares = distance + torch.finfo(x.dtype).tiny
        chosen.append(torch.multinomial(shares, 1, generator=generator)[0])
    return x[torch.stack(chosen)]


@torch.enable_grad()
def _fit_classifier(
    x: Tensor, members: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    weight = x.new_zeros(count, x.shape[1], requires_grad=True)
    bias = x.new_zeros(count, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=_RATE, weight_decay=1e-3)
    for step in range(_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * (1 - step / _STEPS)
        drawn = torch.randint(0, len(x), (_DRAWN,), generator=generator, device=x.device)
        loss = F.cross_entropy(F.linear(x[drawn], weight, bias), members[drawn])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weight.detach(), bias.detach()
