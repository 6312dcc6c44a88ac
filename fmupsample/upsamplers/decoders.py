"""Upsamplers as parts of a decoder, by name: one word chooses the method."""

from __future__ import annotations

from dataclasses import fields
from math import ceil, log2
from typing import Any

from fmupsample.errors import UsageError
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.registry import (
    METHODS,
    Method,
    decoder_names,
    require_in_library,
    resolve,
)
from fmupsample.upsamplers.stack import StackConfig


def build_for_decoder(
    name: str, channels: int, guidance_channels: int, ratio: int = 2, **options: Any
) -> Upsampler:
    """An upsampler with new parameters, called as ``up(x, guidance)`` whatever its method.

    The guidance is the map with the size that is wanted: a lateral of an FPN, the encoder's map, or
    the normalised picture (3 channels). It says the size, also where the method does not look at
    it, so odd sizes fit.

    Args:
        name: one of ``fmupsample.upsamplers.DECODER_UPSAMPLERS``.
        channels: of the features, and of the result.
        guidance_channels: of the guidance.
        ratio: how many times, about: what stacks of doubling operators are built for. The others do
            any ratio.
        options: of the method's own configuration (a stack: of its operator's).

    Raises:
        UsageError: no such name or option, or a ratio below 1.
    """
    if ratio < 1:
        raise UsageError(f"build_for_decoder: the ratio must be 1 or more, not {ratio}")
    require_in_library(name)
    if name not in decoder_names():
        raise UsageError(f"{name!r} is none of {', '.join(decoder_names())}")
    method = METHODS[name]
    maps = {"channels": channels, "guidance_channels": guidance_channels, "stem": False}
    return method.build(_options(method, maps, ratio, options))


def _options(
    method: Method, maps: dict[str, Any], ratio: int, options: dict[str, Any]
) -> dict[str, Any]:
    """Those of the method's configuration; of ``maps``, what it has a field for."""

    def with_maps(config: type) -> dict[str, Any]:
        known = {field.name for field in fields(config)}
        return {**{name: value for name, value in maps.items() if name in known}, **options}

    if method.config is None:
        return options
    config = resolve(method.config)
    if config is not StackConfig:
        return with_maps(config)
    channels = maps.pop("channels")  # which the stack gives to its operators itself
    operator = with_maps(resolve(method.kind).operator_config)
    return {"channels": channels, "stages": max(1, ceil(log2(ratio))), "operator": operator}
