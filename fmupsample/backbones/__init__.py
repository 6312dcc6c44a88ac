"""Frozen vision models from timm, one patch-grid feature map per picture.

Read :mod:`~fmupsample.backbones.loading` for how a name becomes a model and
:mod:`~fmupsample.backbones.backbone` for what the model then does. Names resolve lazily, so that
listing aliases does not import torch and timm.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmupsample.backbones.backbone import Backbone
    from fmupsample.backbones.loading import load_backbone

__all__ = ["Backbone", "load_backbone"]

_HOMES = {"Backbone": "backbone", "load_backbone": "loading"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"fmupsample.backbones.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
