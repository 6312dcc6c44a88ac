"""Upsamplers: one interface (:mod:`~fmupsample.upsamplers.base`), many methods, head files.

:mod:`~fmupsample.upsamplers.registry` lists the methods. Names resolve on first use, so that
listing them does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fmupsample.upsamplers import registry

if TYPE_CHECKING:
    from fmupsample.upsamplers.api import *  # noqa: F403

    UPSAMPLERS: tuple[str, ...]
    DECODER_UPSAMPLERS: tuple[str, ...]

_NAMES = {"UPSAMPLERS": "upsampler_names", "DECODER_UPSAMPLERS": "decoder_names"}


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(registry, _NAMES[name])()
    api = import_module("fmupsample.upsamplers.api")
    if name == "__all__":
        return sorted([*api.__all__, *_NAMES])
    if name in api.__all__:
        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
