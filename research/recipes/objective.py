"""The self-distillation part of the objective: projection heads, balanced assignments, dense
correspondence.

Sources, each taken in its simplest form:
- self-distillation with an EMA teacher: DINO (Caron et al. 2021);
- masked patch prediction with an online tokenizer: iBOT (Zhou et al. 2022), in the form of DINOv2
(Oquab et al. 2023);
- balanced assignments by Sinkhorn-Knopp: SwAV (Caron et al. 2020);
- the same place in two views: PixPro (Xie et al. 2021) and DenseCL (Wang et al. 2021).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from augment import View, lookup_grid
from backbone import encode


class PrototypeHead(nn.Module):
    """MLP to a small unit vector, then cosine similarity to learned prototypes."""

    def __init__(self, dim: int, prototypes: int, hidden: int = 384, bottleneck: int = 96) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, bottleneck))
        self.prototypes = nn.Parameter(F.normalize(torch.randn(prototypes, bottleneck), dim=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., dim] -> [..., prototypes] in -1..1
        return F.normalize(self.mlp(x).float(), dim=-1) @ F.normalize(self.prototypes, dim=1).T


class Learner(nn.Module):
    """The ViT with everything that is thrown away after training."""

    def __init__(self, vit: nn.Module, targets: int, classes: int, prototypes: int) -> None:
        super().__init__()
        dim = vit.embed_dim
        self.vit = vit
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.regress = nn.Linear(dim, targets)
        self.patch_head = PrototypeHead(dim, prototypes)
        self.whole_head = PrototypeHead(dim, prototypes // 4)
        self.classify = nn.Linear(dim, max(1, classes))

    def forward(
        self, images: torch.Tensor, mask: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        prefix, patches = encode(self.vit, images, mask, self.mask_token)
        return {
            "patches": patches,
            "patch_similarity": self.patch_head(patches),
            "whole_similarity": self.whole_head(prefix[:, 0]),
        }


@torch.no_grad()
def balanced_assignment(
    similarity: torch.Tensor, temperature: float, rounds: int = 3
) -> torch.Tensor:
    """Soft assignments [N, K] whose prototypes are used equally often over the batch
    (Sinkhorn-Knopp)."""
    q = ((similarity.float() - similarity.max()) / temperature).exp()
    for _ in range(rounds):
        q = q / q.sum(0, keepdim=True).clamp_min(1e-12)
        q = q / q.sum(1, keepdim=True).clamp_min(1e-12)
    return q


def agreement(
    student: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Weighted mean cross-entropy between target assignments [N, K] and student similarities [N,
    K]."""
    loss = -(target * F.log_softmax(student / temperature, dim=-1)).sum(-1)
    return (loss * weight).sum() / weight.sum().clamp_min(1)


def dense_agreement(
    student: torch.Tensor,  # [2B, h, w, K]: similarities, view A then view B
    teacher: torch.Tensor,  # [2B, h, w, K]
    mask: torch.Tensor,  # [2B, h, w]: patches hidden from the student
    views: tuple[View, View],
    temperatures: tuple[float, float],  # student, teacher
) -> tuple[torch.Tensor, torch.Tensor]:
    """(masked prediction within a view, same place across views)."""
    n, h, w, k = student.shape
    target = balanced_assignment(teacher.reshape(-1, k), temperatures[1]).view(n, h, w, k)
    flat = student.reshape(-1, k)
    within = agreement(flat, target.view(-1, k), mask.flatten().float(), temperatures[0])

    a, b = views
    half = n // 2
    grid_ab, inside_a = lookup_grid(a, b, h, w)
    grid_ba, inside_b = lookup_grid(b, a, h, w)
    maps = target.permute(0, 3, 1, 2)
    from_b = F.grid_sample(maps[half:], grid_ab, padding_mode="border", align_corners=False)
    from_a = F.grid_sample(maps[:half], grid_ba, padding_mode="border", align_corners=False)
    crossed = torch.cat([from_b, from_a]).permute(0, 2, 3, 1).reshape(-1, k)
    inside = torch.cat([inside_a, inside_b]).flatten().float()
    return within, agreement(flat, crossed, inside, temperatures[0])


def global_agreement(
    student: torch.Tensor, teacher: torch.Tensor, temperatures: tuple[float, float]
) -> torch.Tensor:  # both [2B, K]
    """The whole picture across views (DINO): the student's view A against the teacher's view B, and
    back."""
    target = balanced_assignment(teacher, temperatures[1])
    a, b = target.chunk(2)
    return agreement(
        student, torch.cat([b, a]), torch.ones(len(student), device=student.device), temperatures[0]
    )


@torch.no_grad()
def move_average(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Exponential moving average of all parameters (DINO's teacher)."""
    old, new = list(teacher.parameters()), list(student.parameters())
    torch._foreach_lerp_(old, [p.detach() for p in new], 1 - momentum)
