"""From a name to a frozen model: :func:`load_backbone`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from fmupsample.backbones.backbone import Backbone
from fmupsample.backbones.building import build_model, native_size
from fmupsample.backbones.checkpoint import load_checkpoint, read_checkpoint
from fmupsample.backbones.embedded import embedded_path, is_backbone_file, load_backbone_file
from fmupsample.backbones.hub import fetch, ways_on
from fmupsample.backbones.names import EMBEDDED, Resolved, resolve
from fmupsample.backbones.views import check_views, with_views
from fmupsample.errors import BackboneError
from fmupsample.fingerprint import fingerprint


def load_backbone(
    name: str = EMBEDDED,
    *,
    layer: int | str | None = None,
    weights: str | Path | None = None,
    pretrained: bool = True,
    image_size: tuple[int, int] | None = None,
    views: int = 1,
) -> Backbone:
    """Load a frozen backbone onto the CPU, in eval mode, float32.

    Args:
        name: ``"embedded"`` (shipped, needs no network), an alias (``"dinov2-s"``), or any timm
            model with or without its tag (``"vit_small_patch14_dinov2.lvd142m"``).
        layer: which block (ViT) or level (ConvNeXt, Swin, ResNet, ...) to take the features from:
            an index from 0, from the end if negative, or ``"s16"`` for the last level of stride 16.
            Default: the last block; of hierarchical nets the deepest level of stride <= 16.
            The model's final norm is applied to whichever block of a ViT is chosen.
        weights: a local checkpoint to load instead of the pretrained weights; nothing is
            downloaded. With ``"embedded"`` a file of the embedded model's format.
        pretrained: ``False`` gives random weights, for tests and sizes.
        image_size: ``(H, W)`` to build models for that take only one size; others ignore it.
        views: in how many shifted views the backbone sees every image: 1, 2 (along the diagonal,
            by half a patch), 4 (2 x 2) or 9 (3 x 3). Its grid is two (three) times as fine, and
            every image takes so many passes; see :mod:`fmupsample.backbones.views`.

    Raises:
        BackboneError: unknown name or layer, weights that cannot be had or do not fit. The
            message names what can be done.
        UsageError: so many views are not possible.
    """
    check_views(views)
    return with_views(_load(name, layer, weights, pretrained, image_size), views)


def _load(
    name: str,
    layer: int | str | None,
    weights: str | Path | None,
    pretrained: bool,
    image_size: tuple[int, int] | None,
) -> Backbone:
    if name.strip().lower() == EMBEDDED or (weights and is_backbone_file(weights)):
        path = weights if weights is not None else embedded_path()
        return _from_backbone_file(path, layer, shipped=weights is None)
    wanted = resolve(name)
    if weights is not None:
        model = build_model(wanted.full, image_size=image_size)
        load_checkpoint(model, weights, wanted.architecture)
        full = f"{wanted.architecture}.local-{fingerprint(model.state_dict())}"
    elif not pretrained:
        model = build_model(wanted.full, image_size=image_size, random=True)
        full = f"{wanted.architecture}.random"
    else:
        model = _pretrained(wanted, image_size)
        full = wanted.full
    cfg = model.pretrained_cfg
    return Backbone(
        model,
        name=full,
        architecture=wanted.architecture,
        layer=layer,
        mean=cfg["mean"],
        std=cfg["std"],
        native_size=native_size(model, image_size),
    )


def _from_backbone_file(path: str | Path, layer: int | str | None, *, shipped: bool) -> Backbone:
    model, header = load_backbone_file(path)
    size = header.model_args.get("img_size", header.image_size)
    height, width = (size, size) if isinstance(size, int) else size
    return Backbone(
        model,
        name=header.tag if shipped else f"{header.tag}.local-{fingerprint(model.state_dict())}",
        architecture=header.architecture,
        layer=layer,
        mean=header.mean,
        std=header.std,
        native_size=(int(height), int(width)),
        default_image_size=header.image_size,
        card=header.card,
    )


def _pretrained(wanted: Resolved, image_size: tuple[int, int] | None) -> nn.Module:
    if not wanted.tag:
        raise BackboneError(
            f"timm has no pretrained weights for {wanted.architecture}; {ways_on(wanted.asked)}"
        )
    path = fetch(wanted)
    # timm converts names and sizes itself; it is given the file so that it never goes online.
    overlay: dict[str, Any] = {"file": str(path)}
    if path.suffix != ".npz":
        overlay["custom_load"] = False
    if path.suffix not in (".npz", ".safetensors"):
        overlay = {"state_dict": read_checkpoint(path), "custom_load": False}
    try:
        model = build_model(wanted.full, image_size=image_size, overlay=overlay)
    except SafetensorError as error:
        raise BackboneError(
            f"{path} is damaged ({error}); delete it and run again to download it anew"
        ) from error
    for key in overlay:
        model.pretrained_cfg.pop(key, None)  # lets go of the second copy of the weights
    return model
