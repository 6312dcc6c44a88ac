"""Synthetic scenes: coloured discs and boxes on a textured ground, with all that can be asked.

What the examples of decoders are trained on, so that they run anywhere in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = 3  # ground, disc, box


@dataclass(frozen=True)
class Scenes:
    """``image`` ``[N, 3, H, W]`` around 0, ``labels`` int64 ``[N, H, W]``, ``depth`` ``[N, 1, H,
    W]`` (1 far, towards 0 near), and ``alpha`` ``[N, 1, H, W]`` of all objects, in 0..1.
    """

    image: Tensor
    labels: Tensor
    depth: Tensor
    alpha: Tensor

    def part(self, first: int, count: int) -> Scenes:
        """Some of them, beginning anew at the end."""
        index = torch.arange(first, first + count) % len(self.image)
        return Scenes(self.image[index], self.labels[index], self.depth[index], self.alpha[index])


def draw_scenes(count: int, size: tuple[int, int] = (64, 64), seed: int = 0) -> Scenes:
    """Random scenes, the same for the same seed."""
    random = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=random)

    height, width = size
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    images, labels, depths, alphas = [], [], [], []
    for _ in range(count):
        image = uniform(-1, 1, 3, 1, 1).expand(3, height, width).clone()
        texture = torch.randn(1, 3, height // 4 + 1, width // 4 + 1, generator=random)
        image += 0.15 * F.interpolate(texture, size, mode="bilinear", align_corners=False)[0]
        label = torch.zeros(height, width, dtype=torch.int64)
        depth = (1 - 0.3 * y / height).clone()
        alpha = torch.zeros(height, width)
        for kind in (1, 2, 1, 2):
            cy, cx = uniform(0, height, 1), uniform(0, width, 1)
            r = uniform(0.1, 0.22, 1) * min(size)
            if kind == 1:
                distance = ((y - cy) ** 2 + (x - cx) ** 2).sqrt() - r
            else:
                distance = torch.maximum((y - cy).abs() - r, (x - cx).abs() - 1.3 * r)
            cover = (0.5 - distance / 2).clamp(0, 1)  # edges two pixels soft
            # Discs are warm, boxes are cold: a class can be told by colour, but not by one channel.
            warm = torch.tensor([0.9, 0.0, -0.9]) * (1 if kind == 1 else -1)
            colour = (warm + uniform(-0.4, 0.4, 3))[:, None, None]
            image = cover * colour + (1 - cover) * image
            inside = distance < 0
            label[inside] = kind
            depth[inside] = uniform(0.1, 0.6, 1)
            alpha = cover + (1 - cover) * alpha
        image += 0.05 * torch.randn(3, height, width, generator=random)
        images.append(image)
        labels.append(label)
        depths.append(depth[None])
        alphas.append(alpha[None])
    return Scenes(*(torch.stack(t) for t in (images, labels, depths, alphas)))


def boundary(labels: Tensor, width: int = 2) -> Tensor:
    """Bool ``[N, H, W]``: pixels less than ``width`` pixels from another label."""
    marks = labels[:, None].float()
    size = 2 * width - 1
    high = F.max_pool2d(marks, size, 1, width - 1)
    low = -F.max_pool2d(-marks, size, 1, width - 1)
    return (high != low)[:, 0]


def fit(model: torch.nn.Module, loss, scenes: Scenes, steps: int, lr: float = 3e-3) -> None:
    """Train ``model`` with AdamW: ``loss(model, scenes)`` of four scenes a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, scenes.part(4 * step, 4)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def print_row(name: str, numbers: dict[str, float]) -> None:
    """A line of a comparison."""
    print(f"{name:15}" + "".join(f"  {key} {value:.4f}" for key, value in numbers.items()))
