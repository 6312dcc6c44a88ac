"""What is trained: the head, and the probes of the ``task`` term beside it."""

from __future__ import annotations

from copy import deepcopy
from math import cos, pi

import torch
from torch import Tensor, nn

from fmupsample.errors import UsageError
from fmupsample.training.config import TrainConfig
from fmupsample.upsamplers.base import Upsampler


class Model(nn.Module):
    """The head; for ``task`` also its linear probe, and one fitted to bilinear upsampling, without
    which the two could not be compared.

    Args:
        classes: of the labels; 0: no probes.
    """

    def __init__(self, head: Upsampler, channels: int, classes: int = 0) -> None:
        super().__init__()
        self.head = head
        self.probe = nn.Conv2d(channels, classes, 1) if classes else None
        self.plain_probe = deepcopy(self.probe)


def check_trainable(head: Upsampler, stride: tuple[int, int]) -> None:
    """Refuse an upsampler that cannot be trained on pictures.

    Raises:
        UsageError: no parameters, a guidance that is not the picture, a ratio that is not the
            backbone's.
    """
    if not any(True for _ in head.parameters()):
        raise UsageError(f"upsampler {head.name} has no parameters: there is nothing to train")
    if head.needs_guidance and not head.guidance_is_image:
        raise UsageError(
            f"this {head.name} takes a guidance map of a decoder; train one that takes the picture"
        )
    if head.fixed_ratio is not None and (head.fixed_ratio,) * 2 != tuple(stride):
        raise UsageError(
            f"{head.name} upsamples exactly {head.fixed_ratio} times, but this backbone has "
            f"{stride[0]:.4g}x{stride[1]:.4g} pixels a cell"
        )


def make_optimizer(model: Model, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW in groups: no decay on what has one dimension (norms, biases), and the multipliers.

    Each group carries its ``multiplier``; see :func:`set_learning_rate`.

    Raises:
        UsageError: a multiplier for parameters that do not exist.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    used = set()
    for name, parameter in model.named_parameters():
        own = name.removeprefix("head.")
        fitting = [p for p in config.lr_multipliers if own == p or own.startswith(f"{p}.")]
        used.update(fitting)
        multiplier = config.lr_multipliers[max(fitting, key=len)] if fitting else 1.0
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((decay, float(multiplier)), []).append(parameter)
    unknown = sorted(set(config.lr_multipliers) - used)
    if unknown:
        tops = sorted({n.removeprefix("head.").split(".")[0] for n, _ in model.named_parameters()})
        raise UsageError(
            f"lr_multipliers: no parameters begin with {', '.join(unknown)}; there are "
            f"{', '.join(tops)}"
        )
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "multiplier": multiplier}
            for (decay, multiplier), parameters in groups.items()
        ],
        lr=config.lr,
    )


def learning_rate(step: int, config: TrainConfig) -> float:
    """Of a step: linear warm-up, then a cosine down to ``final_lr`` of the peak at the last one."""
    warm = round(config.warmup * config.steps)
    if step < warm:
        return config.lr * (step + 1) / warm
    share = (step - warm) / max(1, config.steps - 1 - warm)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + cos(pi * share)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["multiplier"]


@torch.no_grad()
def update_average(average: Model, model: Model, step: int, decay: float) -> None:
    """Move ``average`` towards ``model`` after ``step`` (from 0); faster in the first steps."""
    decay = min(decay, (step + 1) / (step + 10))
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)
    for mean, value in zip(average.buffers(), model.buffers(), strict=True):
        mean.copy_(value)


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether every number is finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
