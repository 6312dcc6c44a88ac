"""Random views of a batch of squares, made on whatever device the batch is on, with their geometry
kept.

A view remembers the affine map from its own coordinates to those of the picture, so that a place in
one view can be looked up in the other: that is what turns self-distillation into a *dense*
objective. Coordinates follow torch's grid_sample: -1..1 from edge to edge (align_corners=False), x
first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class View:
    clean: torch.Tensor  # [B, 3, S, S] in 0..1: geometry only
    images: torch.Tensor  # [B, 3, S, S] in 0..1: with photometric changes, what the student sees
    scale: (
        torch.Tensor
    )  # [B, 2] (x, y): picture coordinate = scale * view coordinate + shift; negative x = mirrored
    shift: torch.Tensor  # [B, 2]


def uniform(low: float, high: float, *shape: int, device: torch.device) -> torch.Tensor:
    return torch.empty(shape, device=device).uniform_(low, high)


def random_boxes(
    count: int, area: tuple[float, float], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Crop boxes as (scale, shift): area fraction in `area`, aspect ratio within 3:4 .. 4:3, half
    of them mirrored."""
    root = uniform(*area, count, device=device).sqrt()
    aspect = uniform(-0.144, 0.144, count, device=device).exp()  # square root of the aspect ratio
    scale = torch.stack([root * aspect, root / aspect], 1).clamp(max=1)
    shift = uniform(-1, 1, count, 2, device=device) * (1 - scale)
    mirror = torch.where(torch.rand(count, device=device) < 0.5, -1.0, 1.0)
    return torch.stack([scale[:, 0] * mirror, scale[:, 1]], 1), shift


def cut(squares: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, size: int) -> torch.Tensor:
    """Resample boxes of `squares` [B, 3, S, S] (0..1) to `size` pixels.

    Boxes that shrink by more than 1.4 are taken from a half-size copy: bilinear sampling alone
    would alias.
    """
    theta = torch.zeros(len(squares), 2, 3, device=squares.device)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale[:, 0], scale[:, 1], shift
    grid = F.affine_grid(theta, [len(squares), 3, size, size], align_corners=False)
    small = scale.abs().amax(1) * squares.shape[-1] > 1.4 * size
    out = torch.empty(len(squares), 3, size, size, device=squares.device)
    for rows, source in ((~small, squares), (small, F.avg_pool2d(squares, 2))):
        index = rows.nonzero()[:, 0]
        out[index] = F.grid_sample(
            source[index], grid[index], padding_mode="reflection", align_corners=False
        )
    return out


def photometric(x: torch.Tensor, strength: float) -> torch.Tensor:
    """Brightness, contrast, saturation, colour cast, sometimes grey or blurred; one draw per
    picture.

    Milder than in DINO: dense probes live on colour and fine texture, so features should not lose
    them.
    """
    b, device = len(x), x.device

    def draw(spread: float) -> torch.Tensor:
        return uniform(1 - spread * strength, 1 + spread * strength, b, 1, 1, 1, device=device)

    soft = torch.rand(b, device=device) < 0.25 * strength
    index = soft.nonzero()[:, 0]
    x = x.clone()
    x[index] = F.avg_pool2d(F.pad(x[index], (1, 1, 1, 1), mode="replicate"), 3, 1)
    grey = (x * x.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    saturation = draw(0.5)
    saturation[torch.rand(b, device=device) < 0.1 * strength] = 0
    x = grey + (x - grey) * saturation
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (mean + (x - mean) * draw(0.4)) * draw(0.4)
    cast = 1 + 0.1 * strength * uniform(-1, 1, b, 3, 1, 1, device=device)
    return (x * cast).clamp(0, 1)


def make_view(squares: torch.Tensor, size: int, area: tuple[float, float], strength: float) -> View:
    scale, shift = random_boxes(len(squares), area, squares.device)
    clean = cut(squares, scale, shift, size)
    return View(clean, photometric(clean, strength), scale, shift)


def lookup_grid(here: View, there: View, h: int, w: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For every patch centre of `here`: its place in `there` [B, h, w, 2] for grid_sample, and
    whether it is inside."""
    device = here.scale.device
    y = (torch.arange(h, device=device) + 0.5) * 2 / h - 1
    x = (torch.arange(w, device=device) + 0.5) * 2 / w - 1
    centres = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # [h, w, 2]
    in_picture = centres * here.scale[:, None, None] + here.shift[:, None, None]
    grid = (in_picture - there.shift[:, None, None]) / there.scale[:, None, None]
    return grid, (grid.abs() < 1 - 0.5 / max(h, w)).all(-1)


def block_masks(
    count: int, h: int, w: int, ratio: tuple[float, float], device: torch.device
) -> torch.Tensor:
    """Masks [count, h, w]: per picture a smooth random field cut at a random quantile, so holes are
    blobs of any shape.

    Blobs cannot be filled in from the next patch alone (BEiT and iBOT mask rectangles for the same
    reason). Fields instead of rectangles are made for a whole batch at once on any device.
    """
    coarse = torch.rand(count, 1, max(2, h // 3), max(2, w // 3), device=device)
    field = F.interpolate(coarse, (h, w), mode="bilinear", align_corners=False)[:, 0]
    field = field + 0.15 * torch.rand(count, h, w, device=device)
    share = uniform(*ratio, count, device=device)
    rank = field.flatten(1).argsort(1).argsort(1).view(count, h, w)
    return rank < (share * h * w).round()[:, None, None]
