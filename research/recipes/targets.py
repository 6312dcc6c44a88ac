"""What to regress at every patch: local descriptors that need no training.

Self-distillation from scratch takes tens of epochs before its targets mean anything. Regression
onto fixed dense targets is useful from the first step: MaskFeat (Wei et al. 2022) shows it for
histograms of oriented gradients.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class LocalDescriptors(nn.Module):
    """Orientation histograms and opponent-colour moments of 2 x 2 cells per patch: [B, 3, H, W] ->
    [B, h, w, 56]."""

    dim = 4 * (8 + 3 + 3)

    def __init__(self, patch: int, bins: int = 8) -> None:
        super().__init__()
        self.cell, self.bins = patch // 2, bins

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        red, green, blue = x.unbind(1)
        grey = 0.299 * red + 0.587 * green + 0.114 * blue
        opponent = torch.stack([grey, red - green, 0.5 * (red + green) - blue], 1)
        padded = F.pad(grey[:, None], (1, 1, 1, 1), mode="replicate")
        dx = padded[:, 0, 1:-1, 2:] - padded[:, 0, 1:-1, :-2]
        dy = padded[:, 0, 2:, 1:-1] - padded[:, 0, :-2, 1:-1]
        strength = (dx**2 + dy**2 + 1e-12).sqrt()
        place = (
            torch.atan2(dy, dx) % math.pi * (self.bins / math.pi)
        )  # unsigned orientation, in bins
        centres = torch.arange(self.bins, device=x.device)[:, None, None]
        distance = (place[:, None] - centres).abs()
        share = (1 - torch.minimum(distance, self.bins - distance)).clamp(
            min=0
        )  # linear interpolation between bins
        histogram = F.avg_pool2d(share * strength[:, None], self.cell)
        block = F.avg_pool2d(
            F.pad((histogram**2).sum(1, keepdim=True), (1, 1, 1, 1), mode="replicate"), 3, 1
        )
        histogram = histogram / (
            block.sqrt() + 0.02
        )  # contrast normalisation over neighbouring cells, as in HOG
        mean = F.avg_pool2d(opponent, self.cell)
        spread = (F.avg_pool2d(opponent**2, self.cell) - mean**2).clamp(min=0).add(1e-6).sqrt()
        cells = torch.cat([histogram, mean, spread], 1)
        return F.pixel_unshuffle(cells, 2).permute(
            0, 2, 3, 1
        )  # the four cells of a patch side by side


class DenseTargets(nn.Module):
    """Principal components of the local descriptors, whitened.

    Regression onto raw descriptors is mostly a regression of brightness and contrast: a handful of
    directions hold nearly all variance. Whitening makes every direction above the noise count the
    same, which is what a linear probe on the result can use (RADIO's PHI-S, Ranzinger et al. 2024,
    standardises its targets for the same reason).

    Args:
        damping: added to each component's variance, as a share of the largest.
    """

    def __init__(self, patch: int, dim: int = 40, damping: float = 0.01) -> None:
        super().__init__()
        self.dim, self.damping = dim, damping
        self.local = LocalDescriptors(patch)
        self.register_buffer("mean", torch.zeros(self.local.dim))
        self.register_buffer("axes", torch.zeros(self.local.dim, dim))

    @torch.no_grad()
    def calibrate(self, clean: torch.Tensor) -> None:
        """Measure mean and whitening axes on some clean views [N, 3, H, W]."""
        raw = torch.cat([self.local(part) for part in clean.split(64)])
        flat = raw.reshape(-1, raw.shape[-1]).double()
        spread = flat.std(0) + 1e-6
        flat = flat / spread  # channels differ in scale
        mean = flat.mean(0)
        values, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
        values, vectors = values.flip(0)[: self.dim], vectors.flip(1)[:, : self.dim]
        axes = vectors / (values + self.damping * values[0]).sqrt()
        self.axes.copy_(axes / spread[:, None])
        self.mean.copy_(mean * spread)

    @torch.no_grad()
    def forward(self, clean: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] in 0..1 -> [B, h, w, dim]."""
        raw = self.local(clean)
        with torch.autocast(clean.device.type, enabled=False):
            return ((raw.float() - self.mean) @ self.axes).clamp(-5, 5)

    @staticmethod
    def loss(predicted: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Smooth L1 per patch, weighted by ``weight`` [B, h, w]."""
        error = F.smooth_l1_loss(predicted.float(), target, reduction="none").mean(-1)
        return (error * weight).sum() / weight.sum().clamp_min(1)
