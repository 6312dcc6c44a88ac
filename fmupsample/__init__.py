"""Upsample the patch features of frozen vision foundation models to image resolution.

    backbone = fmupsample.load_backbone("dinov2-s")     # any timm name or alias
    up = fmupsample.load_upsampler(backbone)            # its head, or a file, or "bilinear", "jbu"
    features = up(backbone(images), images)             # [B, C, H, W]

Names resolve on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fmupsample._version import __version__
from fmupsample.errors import FmupsampleError

if TYPE_CHECKING:
    from fmupsample.analysis.pca import PCABasis
    from fmupsample.backbones import Backbone, load_backbone
    from fmupsample.pipeline import Pipeline
    from fmupsample.upsamplers import (
        ReSFU,
        ReSFUConfig,
        Upsampler,
        load_official,
        load_upsampler,
        save_head,
    )

_HOMES = {
    "Backbone": "backbones",
    "PCABasis": "analysis",
    "Pipeline": "pipeline",
    "ReSFU": "upsamplers",
    "ReSFUConfig": "upsamplers",
    "Upsampler": "upsamplers",
    "load_backbone": "backbones",
    "load_official": "upsamplers",
    "load_upsampler": "upsamplers",
    "save_head": "upsamplers",
}

__all__ = [
    "Backbone",
    "FmupsampleError",
    "PCABasis",
    "Pipeline",
    "ReSFU",
    "ReSFUConfig",
    "Upsampler",
    "__version__",
    "load_backbone",
    "load_official",
    "load_upsampler",
    "save_head",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"fmupsample.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
