"""From the names of models to a pipeline."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fmupsample.backbones import Backbone, load_backbone
from fmupsample.backbones.names import EMBEDDED, resolve
from fmupsample.device import resolve_device
from fmupsample.errors import UsageError
from fmupsample.images.size import ImageSize
from fmupsample.pipeline.maps import Pipeline
from fmupsample.upsamplers import Upsampler, load_upsampler
from fmupsample.upsamplers.heads import read_head_metadata
from fmupsample.upsamplers.hub import head_file
from fmupsample.upsamplers.registry import METHODS, current_name


def open_pipeline(
    backbone: str | Backbone = "embedded",
    upsampler: str | Path | Upsampler | None = None,
    *,
    layer: int | str | None = None,
    backbone_weights: str | Path | None = None,
    views: int = 1,
    image_size: ImageSize | int | str | tuple[int, int] | None = None,
    device: str | torch.device = "auto",
    **options: Any,
) -> Pipeline:
    """Load models and put them into a :class:`.Pipeline`.

    Args:
        backbone: a name, as of :func:`fmupsample.load_backbone`, or a backbone. The one last asked
            for by name stays loaded.
        upsampler: a method or head file, as of :func:`fmupsample.load_upsampler`, or an upsampler.
        layer, backbone_weights, views: of a backbone by name. The layer is that of a head file,
            if it names one of this backbone.
        options: of the pipeline.

    Raises:
        BackboneError, HeadError: models that cannot be had.
        UsageError: options that exclude each other, or that cannot be honoured.
    """
    place, size = resolve_device(device), ImageSize.of(image_size)
    if layer is None and isinstance(backbone, str) and not isinstance(upsampler, Upsampler):
        layer = layer_of_head(upsampler, backbone)
    if isinstance(backbone, str):
        wanted = (backbone, layer, views, size.exact if size else None)
        if backbone_weights is None:
            model = _shipped_or_cached(*wanted)
        else:
            model = _load(*wanted, weights=backbone_weights)
    elif layer is not None or backbone_weights is not None or views != 1:
        raise UsageError("layer, backbone_weights and views are for a backbone by name")
    else:
        model = backbone
    method = upsampler if isinstance(upsampler, Upsampler) else load_upsampler(model, upsampler)
    return Pipeline(model, method, image_size=size, device=place, **options)


def layer_of_head(head: str | Path | None, backbone: str) -> int | str | None:
    """The layer that a head (file, folder or ``hf:owner/name``) was trained for.

    ``None`` where ``head`` names a method, serves any backbone, or another one than ``backbone``.

    Raises:
        BackboneError, HeadError: there is no such backbone, or no such head.
    """
    if head is None or current_name(str(head)) in METHODS:
        return None
    path = head_file(head)
    if path.suffix != ".safetensors" or not path.is_file():
        return None  # a checkpoint of others; what is not there is told by load_upsampler
    made_for = read_head_metadata(path)["backbone"]
    embedded = backbone.strip().lower() == EMBEDDED
    architecture = EMBEDDED if embedded else resolve(backbone).architecture
    same = str(made_for.get("name")).partition(".")[0] == architecture
    layer = made_for.get("layer")
    return layer if same and isinstance(layer, int | str) else None


def _load(
    name: str,
    layer: int | str | None,
    views: int,
    image_size: tuple[int, int] | None,
    weights: str | Path | None = None,
) -> Backbone:
    return load_backbone(name, layer=layer, views=views, image_size=image_size, weights=weights)


# A file of weights may change under its name; these do not.
_shipped_or_cached = lru_cache(maxsize=1)(_load)
