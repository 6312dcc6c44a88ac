"""The start of a student: the first blocks of a vision transformer with narrower MLPs."""

from __future__ import annotations

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

ARCHITECTURE = "vit_small_patch14_dinov2"
MODEL_ARGS = {"num_classes": 0, "dynamic_img_size": True}


def build_student(depth: int, mlp_ratio: float, img_size: int) -> tuple[nn.Module, dict]:
    """The model and the arguments that timm builds it with."""
    args = MODEL_ARGS | {"depth": depth, "mlp_ratio": mlp_ratio, "img_size": img_size}
    return timm.create_model(ARCHITECTURE, **args), args


@torch.no_grad()
def narrow(student: nn.Module, teacher: nn.Module, images: Tensor) -> list[float]:
    """Give ``student`` the first blocks of ``teacher``, with the most useful neurons of their MLPs.

    Attention, norms and layer scales are taken as they are. Of an MLP the hidden neurons that vary
    most in the output are kept; the second layer is then fitted by least squares, so that what the
    block gives for the student's own input is what the teacher's block gives for the teacher's.

    Args:
        images: some tens of normalised images [B, 3, H, W] to measure on.

    Returns:
        The part of the variance of each block's output that is missed.
    """
    state = {k: v for k, v in teacher.state_dict().items() if not k.startswith("blocks.")}
    state["pos_embed"] = resample_abs_pos_embed(
        state["pos_embed"], list(student.patch_embed.grid_size), num_prefix_tokens=1
    )
    student.load_state_dict(state, strict=False)
    found, wanted = (m.norm_pre(m._pos_embed(m.patch_embed(images))) for m in (student, teacher))
    missed = []
    for block, whole in zip(student.blocks, teacher.blocks, strict=False):
        for part in ("norm1", "attn", "ls1", "norm2", "ls2"):
            getattr(block, part).load_state_dict(getattr(whole, part).state_dict())
        wanted = torch.cat([whole(x) for x in wanted.split(8)])
        middle = torch.cat([x + block.ls1(block.attn(block.norm1(x))) for x in found.split(8)])
        _fit_mlp(block, whole, middle, wanted - middle)
        found = torch.cat([x + block.ls2(block.mlp(block.norm2(x))) for x in middle.split(8)])
        spread = (wanted - wanted.mean((0, 1))).square().sum()
        missed.append(((found - wanted).square().sum() / spread).item())
    return missed


def _fit_mlp(block: nn.Module, whole: nn.Module, inputs: Tensor, wanted: Tensor) -> None:
    """Choose the neurons of ``block.mlp`` and fit its second layer to ``wanted``."""
    hidden = whole.mlp.act(whole.mlp.fc1(block.norm2(inputs).flatten(0, 1)))
    scale = block.ls2.gamma
    scale.copy_(torch.where(scale.abs() < 1e-3, 1e-3, scale))  # it is divided by below
    effect = hidden.var(0) * (whole.mlp.fc2.weight * scale[:, None]).square().sum(0)
    kept = effect.topk(block.mlp.fc1.out_features).indices
    block.mlp.fc1.weight.copy_(whole.mlp.fc1.weight[kept])
    block.mlp.fc1.bias.copy_(whole.mlp.fc1.bias[kept])
    weight, bias = ridge(hidden[:, kept], wanted.flatten(0, 1), 0.003)
    block.mlp.fc2.weight.copy_(weight / scale[:, None])
    block.mlp.fc2.bias.copy_(bias / scale)


def ridge(inputs: Tensor, wanted: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Weight and bias of the linear layer that gives ``wanted`` [M, K] for ``inputs`` [M, C].

    ``damping`` is added to the variances of the inputs, as a share of their mean.
    """
    mean, target = inputs.mean(0), wanted.mean(0)
    centred = inputs - mean
    square = centred.T @ centred
    square.diagonal().add_(damping * square.diagonal().mean())
    weight = torch.linalg.solve(square, centred.T @ (wanted - target)).T
    return weight, target - weight @ mean
