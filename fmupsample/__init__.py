"""Upsample the patch features of frozen vision foundation models to image resolution.

    f = fmupsample.features("cat.jpg")                  # or a folder, with backbone="dinov2-s"
    f.array, f.pca(), f.similarity((120, 80))           # [C, H, W], [H, W, 3], [H, W]

    backbone = fmupsample.load_backbone("dinov2-s")     # any timm name or alias
    up = fmupsample.load_upsampler(backbone)            # its head, or a file, or "bilinear", "jbu"
    images = backbone.prepare(["cat.jpg", "dog.jpg"], image_size=(448, 448))
    dense = up(backbone(images), images)                # [B, C, H, W]
    fmupsample.extract("photos/", "features/")          # also visualize, train, probe
    crop = fmupsample.open("cat.safetensors")[:, :64, :64]      # of what `fmupsample extract` wrote

Names resolve on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fmupsample._version import __version__
from fmupsample.errors import FmupsampleError

if TYPE_CHECKING:
    from fmupsample import probe
    from fmupsample.backbones import Backbone, load_backbone
    from fmupsample.draw.pca import PCABasis
    from fmupsample.formats import CompactFeatures, FeatureArray, open_shards
    from fmupsample.formats import open_features as open  # noqa: F401 - as in _HOMES
    from fmupsample.image_features import ImageFeatures, features
    from fmupsample.pipeline import Pipeline
    from fmupsample.upsamplers import (
        ReSFU,
        ReSFUConfig,
        Upsampler,
        from_pretrained,
        load_head,
        load_official,
        load_upsampler,
        push_to_hub,
        save_head,
        save_pretrained,
    )
    from fmupsample.verbs import extract, train, visualize

_HOMES = {
    "Backbone": "backbones",
    "CompactFeatures": "formats",
    "FeatureArray": "formats",
    "ImageFeatures": "image_features",
    "PCABasis": "draw",
    "Pipeline": "pipeline",
    "ReSFU": "upsamplers",
    "ReSFUConfig": "upsamplers",
    "Upsampler": "upsamplers",
    "extract": "verbs",
    "features": "image_features",
    "from_pretrained": "upsamplers",
    "load_backbone": "backbones",
    "load_head": "upsamplers",
    "load_official": "upsamplers",
    "load_upsampler": "upsamplers",
    "open": "formats",
    "open_shards": "formats",
    "push_to_hub": "upsamplers",
    "save_head": "upsamplers",
    "save_pretrained": "upsamplers",
    "train": "verbs",
    "visualize": "verbs",
}

# Without "open": it is written `fmupsample.open`, and a star import shall not hide Python's own.
__all__ = [
    "Backbone",
    "CompactFeatures",
    "FeatureArray",
    "FmupsampleError",
    "ImageFeatures",
    "PCABasis",
    "Pipeline",
    "ReSFU",
    "ReSFUConfig",
    "Upsampler",
    "__version__",
    "extract",
    "features",
    "from_pretrained",
    "load_backbone",
    "load_head",
    "load_official",
    "load_upsampler",
    "open_shards",
    "probe",
    "push_to_hub",
    "save_head",
    "save_pretrained",
    "train",
    "visualize",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        inside = "open_features" if name == "open" else name
        return getattr(import_module(f"fmupsample.{_HOMES[name]}"), inside)
    if name == "probe":
        return import_module("fmupsample.probe")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, "probe"})
