"""What to regress at every patch: local descriptors that need no training, and maps of a small
convolutional guide.

Self-distillation from scratch takes tens of epochs before its targets mean anything. Regression
onto fixed dense targets is useful from the first step: MaskFeat (Wei et al. 2022) shows it for
histograms of oriented gradients, and DeiT (Touvron et al. 2021) that a convolutional teacher passes
its inductive bias to a ViT on little data.
"""

from __future__ import annotations

import math
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import nn

from backbone import MEAN, STD

GUIDE = "resnet10t"


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


class ConvGuide(nn.Module):
    """Frozen convolutional network; its stages 2 (stride 8), 3 (16) and 4 (32) resampled to the
    patch grid.

    Args:
        largest: views of more pixels a side are shown to it at this size, so that a whole object
            fits into its receptive field however large the ViT sees it.
    """

    def __init__(self, path: Path, largest: int) -> None:
        super().__init__()
        self.largest = largest
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.net = timm.create_model(GUIDE, num_classes=state["fc.weight"].shape[0])
        self.net.load_state_dict(state)
        self.net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.dim = sum(info["num_chs"] for info in self.net.feature_info[2:])
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(STD)[:, None, None])

    @torch.no_grad()
    def forward(self, x: torch.Tensor, h: int, w: int) -> torch.Tensor:  # -> [B, h, w, dim]
        x = (x - self.mean) / self.std
        if x.shape[-1] > self.largest:
            x = F.interpolate(x, size=(self.largest,) * 2, mode="bilinear", antialias=True)
        x = x.contiguous(memory_format=torch.channels_last)
        maps = self.net.forward_intermediates(x, indices=[2, 3, 4], intermediates_only=True)
        fitted = [
            F.adaptive_avg_pool2d(m.float(), (h, w)) if m.shape[-1] >= w
            else F.interpolate(m.float(), (h, w), mode="bilinear", align_corners=False)
            for m in maps
        ]  # fmt: skip
        return torch.cat(fitted, 1).permute(0, 2, 3, 1)


class DenseTargets(nn.Module):
    """Both kinds side by side, each as principal components, whitened or damped.

    Regression onto raw descriptors is mostly a regression of brightness and contrast: a handful of
    directions hold nearly all variance. Whitening makes every direction above the noise count the
    same, which is what a linear probe on the result can use (RADIO's PHI-S, Ranzinger et al. 2024,
    standardises its targets for the same reason). Later in training the other choice is better:
    with targets in their natural proportions the strongest directions of the features are again
    what sets objects apart.

    Args:
        damping: added to each component's variance, as a share of the largest: 0.01 whitens,
            1 and more keeps natural proportions.
        local_share: 0..1, weight of the local descriptors in the loss; the guide has the rest.
    """

    def __init__(
        self,
        patch: int,
        guide: Path | None,
        kept: tuple[int, int] = (40, 96),
        damping: float = 0.01,
        local_share: float = 0.5,
        guide_size: int = 1000,
    ) -> None:
        super().__init__()
        self.patch, self.damping = patch, damping
        self.shares = [local_share, 1 - local_share] if guide else [1.0]
        self.local = LocalDescriptors(patch)
        self.guide = ConvGuide(guide, guide_size) if guide else None
        self.kept = list(kept) if guide else [kept[0]]
        self.dim = sum(self.kept)
        raw = [self.local.dim] + ([self.guide.dim] if self.guide else [])
        for i, (size, keep) in enumerate(zip(raw, self.kept, strict=True)):
            self.register_buffer(f"mean_{i}", torch.zeros(size))
            self.register_buffer(f"axes_{i}", torch.zeros(size, keep))

    def raw(self, clean: torch.Tensor) -> list[torch.Tensor]:
        h, w = clean.shape[2] // self.patch, clean.shape[3] // self.patch
        return [self.local(clean)] + ([self.guide(clean, h, w)] if self.guide else [])

    @torch.no_grad()
    def calibrate(self, clean: torch.Tensor) -> None:
        """Measure means and whitening axes on some clean views [N, 3, H, W]."""
        parts = [torch.cat(p) for p in zip(*[self.raw(c) for c in clean.split(64)], strict=True)]
        for i, (part, keep) in enumerate(zip(parts, self.kept, strict=True)):
            flat = part.reshape(-1, part.shape[-1]).double()
            flat = flat / (flat.std(0) + 1e-6)  # channels first: stages differ in scale
            mean = flat.mean(0)
            values, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
            values, vectors = values.flip(0)[:keep], vectors.flip(1)[:, :keep]
            axes = vectors / (values + self.damping * values[0]).sqrt()
            spread = part.reshape(-1, part.shape[-1]).double().std(0) + 1e-6
            getattr(self, f"axes_{i}").copy_(axes / spread[:, None])
            getattr(self, f"mean_{i}").copy_(mean * spread)

    @torch.no_grad()
    def forward(
        self, clean: torch.Tensor
    ) -> torch.Tensor:  # [B, 3, H, W] in 0..1 -> [B, h, w, dim]
        parts = self.raw(clean)
        with torch.autocast(clean.device.type, enabled=False):
            parts = [
                (p.float() - getattr(self, f"mean_{i}")) @ getattr(self, f"axes_{i}")
                for i, p in enumerate(parts)
            ]
        return torch.cat(parts, -1).clamp(-5, 5)

    def loss(
        self, predicted: torch.Tensor, target: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """Smooth L1 per patch, each kind with its share however many components it has.
        `weight` [B, h, w]."""
        error = F.smooth_l1_loss(predicted.float(), target, reduction="none")
        parts = zip(self.shares, error.split(self.kept, -1), strict=True)
        per_patch = sum(share * part.mean(-1) for share, part in parts)
        return (per_patch * weight).sum() / weight.sum().clamp_min(1)
