"""Building a timm model without its classifier and, where it can, for pictures of any size."""

from __future__ import annotations

import contextlib
from typing import Any

import timm
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fmupsample.errors import BackboneError

# Ways of asking an architecture to accept any picture size, the best first. Constructors that do
# not know an argument raise TypeError before anything is built.
_FLEXIBLE: tuple[dict[str, Any], ...] = (
    {"dynamic_img_size": True},  # ViT, EVA, Swin in newer timm
    {"strict_img_size": False},  # Swin
)


def build_model(
    name: str,
    *,
    image_size: tuple[int, int] | None = None,
    overlay: dict[str, Any] | None = None,
    model_args: dict[str, Any] | None = None,
    random: bool = False,
) -> nn.Module:
    """A timm model on the CPU without classifier.

    Args:
        name: architecture, with or without a pretrained tag.
        image_size: (H, W) to build models of one size for; others ignore it.
        overlay: where timm finds the weights (its ``pretrained_cfg_overlay``), already on this
            disk; ``None`` when the caller loads them.
        model_args: keyword arguments of the architecture, used as they are.
        random: draw random weights; without it, weights that are not loaded are zero.

    Raises:
        BackboneError: timm cannot build it.
    """
    pretrained = {"pretrained": True, "pretrained_cfg_overlay": overlay} if overlay else {}
    fixed = [{"img_size": image_size}] if image_size is not None else []
    attempts = [model_args] if model_args is not None else [*_FLEXIBLE, *fixed, {}]
    for kwargs in attempts:
        try:
            with contextlib.nullcontext() if random else _ZerosForRandom():
                return timm.create_model(name, num_classes=0, **pretrained, **kwargs)
        except TypeError as error:
            # An architecture that does not know the argument; the last attempt has none.
            if kwargs is attempts[-1]:
                raise BackboneError(f"timm cannot build {name}: {error}") from error
        except (RuntimeError, ValueError, AssertionError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BackboneError(f"timm cannot build {name}: {first}") from error
    raise AssertionError("not reached: the last attempt returns or raises")


def native_size(model: nn.Module, image_size: tuple[int, int] | None) -> tuple[int, int]:
    """(H, W) the model was built for, else the one it was pretrained at."""
    if image_size is not None:
        return image_size
    return tuple(model.pretrained_cfg.get("input_size", (3, 224, 224))[-2:])


class _ZerosForRandom(TorchFunctionMode):
    """While this is on, random initialisation writes zeros.

    Drawing 300 million normal numbers that the checkpoint then overwrites takes several seconds;
    and what a checkpoint lacks (parts that enter no feature map) is the same in every run.
    """

    # PyTorch's initialisers, and the steps of timm's own truncated normal.
    _RANDOM = frozenset(
        {getattr(nn.init, name) for name in dir(nn.init) if name.endswith(("normal_", "uniform_"))}
        | {torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.erfinv_}
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self._RANDOM:
            with torch.no_grad():
                return (args[0] if args else kwargs["tensor"]).zero_()
        return func(*args, **kwargs)
