"""Frozen vision models from timm, one patch-grid feature map per picture.

Read :mod:`~fmupsample.backbones.loading` for how a name becomes a model and
:mod:`~fmupsample.backbones.backbone` for what the model then does, and
:mod:`~fmupsample.backbones.views` for backbones that see several views of an image. Names resolve
lazily, so that listing aliases does not import torch and timm.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmupsample.backbones.backbone import Backbone
    from fmupsample.backbones.loading import load_backbone
    from fmupsample.backbones.views import ViewedBackbone

__all__ = ["Backbone", "ViewedBackbone", "load_backbone"]

_HOMES = {"Backbone": "backbone", "ViewedBackbone": "views", "load_backbone": "loading"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"fmupsample.backbones.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
