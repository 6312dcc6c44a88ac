"""Putting renamed parameters into a module."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from fmupsample.errors import HeadError
from fmupsample.upsamplers.base import Upsampler


def required(state: Mapping[str, Tensor], name: str, what: str) -> Tensor:
    """A parameter that says how large the module is.

    Raises:
        HeadError: it is not there.
    """
    if name not in state:
        raise HeadError(f"{what} lack the one for {name}")
    return state[name]


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Official names to ours; the keys are whole names or what a name begins with, up to a dot."""
    found = {}
    for name, tensor in state.items():
        own = name
        for theirs, ours in names.items():
            if name == theirs or name.startswith(f"{theirs}."):
                own = ours + name[len(theirs) :]
        found[own] = tensor
    return found


def encoder_layer(name: str) -> str:
    """The numbered layers of an encoder, ``"image.2.conv.weight"`` -> ``"image.blocks.1.conv..."``.

    Layer 0 is its first convolution; names without a number stay.
    """
    found = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", name)
    if not found:
        return name
    encoder, number, rest = found.groups()
    place = "first" if number == "0" else f"blocks.{int(number) - 1}"
    return f"{encoder}.{place}.{rest}"


def fill(module: Upsampler, state: Mapping[str, Tensor], what: str) -> Upsampler:
    """The module with these parameters, in their dtype and in evaluation mode.

    Raises:
        HeadError: parameters missing, left over, or of other shapes.
    """
    expected = module.state_dict()
    missing = sorted(set(expected) - set(state))
    unexpected = sorted(set(state) - set(expected))
    if missing or unexpected:
        raise HeadError(f"{what} do not fit: missing {missing}, unexpected {unexpected}")
    fitted = {}
    for name, tensor in state.items():
        if tensor.numel() != expected[name].numel():
            raise HeadError(
                f"{what}: {name} has shape {list(tensor.shape)}, expected "
                f"{list(expected[name].shape)}"
            )
        fitted[name] = tensor.reshape(expected[name].shape)
    module.to(next(t for t in fitted.values() if t.is_floating_point()).dtype)
    module.load_state_dict(fitted)
    return module.eval()
