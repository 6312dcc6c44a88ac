"""What is trained, and how its parameters move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import cos, pi
from pathlib import Path

import torch
from torch import nn

from fmupsample.backbones import Backbone
from fmupsample.errors import UsageError
from fmupsample.images.find import printable
from fmupsample.training.config import TrainConfig
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.heads import load_head
from fmupsample.upsamplers.registry import METHODS, any_backbone_names, either, learned_method


def choose_head(
    config: TrainConfig, backbones: Sequence[Backbone], start_from: Path | None
) -> tuple[Upsampler, TrainConfig]:
    """The head to train, and the options with the whole of its configuration.

    Raises:
        UsageError: options that contradict each other, or a head that cannot be trained.
        HeadError: ``start_from`` is damaged, or made for another backbone.
    """
    backbone, universals = backbones[0], any_backbone_names()
    torch.manual_seed(config.seed)
    method = learned_method(config.upsampler)
    for_any = config.upsampler in universals and (
        len(backbones) > 1 or not method.own_heads or config.upsampler_config.get("channels") == 0
    )
    if start_from is not None:
        head = _continued(config, backbone, start_from, for_any)
    else:
        if len(backbones) > 1 and not for_any:
            raise UsageError(
                f"several backbones are for --upsampler {either(universals)}; {config.upsampler} "
                "is trained for one"
            )
        channels = 0 if for_any else backbone.channels
        head = method.build({"channels": channels, **config.upsampler_config})
    for each in backbones:
        check_trainable(head, each.stride)
    if getattr(head.config, "channels", 0) not in (0, backbone.channels):
        raise UsageError(
            f"upsampler_config: channels must be {backbone.channels}, as {backbone.name} has"
        )
    if not head.linear_in_value and "masks" in config.terms:
        raise UsageError(
            f"--objective masks is for upsamplers with kernel weights; {head.name} has none"
        )
    return head, replace(config, upsampler=head.name, upsampler_config=head.config.to_dict())


def _continued(config: TrainConfig, backbone: Backbone, path: Path, for_any: bool) -> Upsampler:
    """The head in ``path``, to go on from."""
    head = load_head(path, backbone).train().requires_grad_(True)
    if config.upsampler not in (*any_backbone_names(), head.name):
        raise UsageError(
            f"{printable(path)} holds a {head.name}, which cannot become a {config.upsampler}: "
            "leave --upsampler away"
        )
    if METHODS[head.name].own_heads and head.config.channels == 0 and not for_any:
        head = head.specialised(backbone.channels).train()
    wanted = {**head.config.to_dict(), **config.upsampler_config}
    if wanted != head.config.to_dict():
        raise UsageError("upsampler_config: a head to go on from keeps its own")
    return head


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


def make_optimizer(head: Upsampler, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW without decay of what has one dimension (norms, biases)."""
    parameters = list(head.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.lr)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Of a step: linear warm-up, then a cosine down to ``final_lr`` of the peak at the last one."""
    warm = round(config.warmup * config.steps)
    if step < warm:
        return config.lr * (step + 1) / warm
    share = (step - warm) / max(1, config.steps - 1 - warm)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + cos(pi * share)))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Move ``average`` towards ``model`` after ``step`` (from 0); faster in the first steps."""
    decay = min(decay, (step + 1) / (step + 10))
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)
    for mean, value in zip(average.buffers(), model.buffers(), strict=True):
        mean.copy_(value)
