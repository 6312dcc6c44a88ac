"""Where in a timm model the features are taken, and what sizes it takes: found by asking it.

timm describes the maps of a model in ``feature_info``: one entry per block of a ViT, one per stage
of a hierarchical net. ``forward_intermediates`` returns them without prefix tokens; the few
architectures without that method are read with a hook on the module that ``feature_info`` names.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fmupsample.errors import BackboneError

log = logging.getLogger(__name__)

# Grid of the probing pictures, in cells: odd and unequal, so that a model which needs an even
# number of cells, whole windows or a square is found out.
_PROBE_GRID = (5, 7)


@dataclass(frozen=True)
class Feature:
    """How to get the features: the index, and whether the model's final norm is applied."""

    index: int
    norm: bool
    module: str | None = None  # hook this module instead of calling forward_intermediates


@dataclass(frozen=True)
class Survey:
    """What the probing found; fields as in :class:`~fmupsample.backbones.Backbone`."""

    feature: Feature
    channels: int
    stride: tuple[int, int]
    size_multiple: tuple[int, int]
    fixed_size: tuple[int, int] | None


def describe_levels(model: nn.Module, architecture: str) -> list[dict]:
    """``feature_info`` of ``model``: dicts with at least ``num_chs`` and ``reduction``."""
    info = getattr(model, "feature_info", None)
    levels = list(getattr(info, "info", info) or [])
    if not levels:
        raise BackboneError(
            f"{architecture} has no feature maps that timm knows of (no feature_info); choose "
            "another model (`fmupsample models`)"
        )
    return levels


def resolve_layer(model: nn.Module, layer: int | str | None, architecture: str) -> int:
    """The index into the model's levels that ``layer`` means.

    ``None`` is the last block of a ViT, and of a hierarchical net the deepest level whose stride is
    at most 16 (deeper maps are too coarse, shallower ones say little). An int counts from 0, or
    from the end if negative. ``"s16"`` is the deepest level of stride 16.

    Raises:
        BackboneError: no such layer; the message lists what there is.
    """
    levels = describe_levels(model, architecture)
    strides = [int(level["reduction"]) for level in levels]
    if layer is None:
        if len(set(strides)) == 1:
            return len(levels) - 1
        return max((i for i, s in enumerate(strides) if s <= 16), default=len(levels) - 1)
    text = str(layer).strip().lower()
    if text.startswith("s") and text[1:].isdigit():
        fitting = [i for i, s in enumerate(strides) if s == int(text[1:])]
        if fitting:
            return fitting[-1]
    elif text.removeprefix("-").isdigit():
        index = int(text)
        if -len(levels) <= index < len(levels):
            return index % len(levels)
    raise BackboneError(
        f"{architecture} has no layer {layer!r}; possible are {_choices(levels, strides)}"
    )


def _choices(levels: list[dict], strides: list[int]) -> str:
    last = len(levels) - 1
    if len(set(strides)) == 1:
        return f"0 to {last} (blocks), -1 to -{last + 1} from the end"
    each = ", ".join(
        f"{i} (stride {s}, {level['num_chs']} channels)"
        for i, (s, level) in enumerate(zip(strides, levels, strict=True))
    )
    return f"{each}; -1 to -{last + 1} from the end; s{strides[-1]} and the like by stride"


def extract(model: nn.Module, images: Tensor, feature: Feature) -> Tensor:
    """Features ``[B, C, h, w]`` of ``images`` ``[B, 3, H, W]``."""
    if feature.module is not None:
        return _hooked(model, images, feature.module)
    (features,) = model.forward_intermediates(
        images,
        indices=[feature.index],
        norm=feature.norm,
        stop_early=True,
        output_fmt="NCHW",
        intermediates_only=True,
    )
    return features


def extract_with_global(
    model: nn.Module, images: Tensor, feature: Feature
) -> tuple[Tensor, Tensor]:
    """Features ``[B, C, h, w]``, and what ``model`` returns of whole images, ``[B, D]``.

    All in one pass, which goes on beyond the layer of the features to the last one.

    Raises:
        BackboneError: the model does not pool its features.
    """
    if feature.module is not None:
        features, last = _hooked(model, images, feature.module, last=True)
    else:
        last, (features,) = model.forward_intermediates(
            images,
            indices=[feature.index],
            norm=feature.norm,
            stop_early=False,
            output_fmt="NCHW",
            intermediates_only=False,
        )
    pooled = model.forward_head(last) if hasattr(model, "forward_head") else last
    if pooled.ndim != 2:
        raise BackboneError(
            f"this model has no vector of the whole image: its head gives {list(pooled.shape)}"
        )
    return features, pooled


def _hooked(
    model: nn.Module, images: Tensor, module: str, *, last: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    caught: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_hook(
        lambda _module, _inputs, output: caught.append(output)
    )
    try:
        end = model.forward_features(images)
    finally:
        handle.remove()
    return (caught[-1], end) if last else caught[-1]


@torch.no_grad()
def survey(model: nn.Module, layer: int, native_size: tuple[int, int], architecture: str) -> Survey:
    """Find channels, stride and the sizes ``model`` takes, by running it on tiny black pictures.

    Raises:
        BackboneError: the model fails on every size tried, or its map is not a regular grid.
    """
    levels = describe_levels(model, architecture)
    reduction = int(levels[layer]["reduction"])
    deepest = int(levels[-1]["reduction"])
    module = None if hasattr(model, "forward_intermediates") else str(levels[layer]["module"])
    failure: Exception | None = None
    multiples = sorted({reduction, deepest, 2 * deepest})
    for multiple in (*multiples, None):
        size = tuple(native_size)
        if multiple is not None:
            size = (multiple * _PROBE_GRID[0], multiple * _PROBE_GRID[1])
        try:
            feature, shape = _choose_norm(model, size, layer, module, levels)
        # Whatever a model raises on a size it cannot take: assertions, shape errors, its own.
        except Exception as error:
            log.debug("%s does not take %s: %s", architecture, size, error)
            failure = error
            continue
        if len(shape) != 4 or size[0] % shape[2] or size[1] % shape[3]:
            failure = BackboneError(
                f"pictures of {size[0]}x{size[1]} pixels give maps of {list(shape[2:])} cells"
            )
            continue
        # The reduction in feature_info is one number; the true stride may differ per axis.
        stride = (size[0] // shape[2], size[1] // shape[3])
        allowed = stride if multiple in (None, reduction) else (multiple, multiple)
        return Survey(feature, int(shape[1]), stride, allowed, None if multiple else size)
    reason = str(failure).strip().splitlines()[0] if str(failure).strip() else repr(failure)
    raise BackboneError(
        f"{architecture} gives no regular feature grid at layer {layer}: {reason}; try another "
        "--layer or model (`fmupsample models`)"
    )


def _choose_norm(
    model: nn.Module, size: tuple[int, int], layer: int, module: str | None, levels: list[dict]
) -> tuple[Feature, tuple[int, ...]]:
    """The way to take ``layer``, with the model's final norm where that makes sense, and the shape.

    The final norm is applied to whichever block is chosen: raw block outputs of a ViT carry a few
    channels a hundred times larger than the rest.
    """
    feature = Feature(layer, norm=True, module=module)
    try:
        shape = _shape(model, size, feature)
    except Exception:  # some models refuse the norm (Hiera); if it is the size, this fails too
        feature = Feature(layer, norm=False, module=module)
        return feature, _shape(model, size, feature)
    if layer != len(levels) - 1 and shape[1] != levels[layer]["num_chs"]:
        # Here the "norm" is a neck that belongs to the last block only (SAM).
        feature = Feature(layer, norm=False, module=module)
        shape = _shape(model, size, feature)
    return feature, shape


def _shape(model: nn.Module, size: tuple[int, ...], feature: Feature) -> tuple[int, ...]:
    parameter = next(model.parameters())
    picture = torch.zeros(1, 3, *size, device=parameter.device, dtype=parameter.dtype)
    return tuple(extract(model, picture, feature).shape)
