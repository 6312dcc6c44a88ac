"""Every upsampler there is, in one table: what it needs, what it can do, what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fmupsample.upsamplers.a2u import A2U, A2UConfig
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.complexity import Cost, cost, stack_cost, training_free_cost
from fmupsample.upsamplers.indexnet import IndexNet, IndexNetConfig
from fmupsample.upsamplers.learned import LEARNED, UNIVERSALS, config_for
from fmupsample.upsamplers.loading import TRAINING_FREE
from fmupsample.upsamplers.stack import Stack, StackConfig
from fmupsample.upsamplers.unpooling import MaxUnpooling

DESCRIPTIONS = {
    "nearest": "every pixel takes its cell's features",
    "bilinear": "bilinear interpolation",
    "bicubic": "bicubic interpolation",
    "jbu": "joint bilateral: cells of like colour",
    "guided": "guided filter: locally affine in the picture",
    "affinity": "cells of the pixel's object, learned from masks",
    "anyup": "attention to the cells in a window",
    "resfu": "similarity by paired differences",
    "resfu-universal": "the same with keys that any backbone has",
    "sapa": "similarity of picture and features, gated",
    "lda-aqu": "self-attention to neighbours that move",
    "fade": "kernels from picture and features",
    "carafe": "kernels from the features",
    "dysample": "samples at learned places",
    "featup": "learned joint bilateral, stage by stage",
    "deconvolution": "transposed convolutions",
    "pixel-shuffle": "sub-pixel convolutions",
    "indexnet": "learned indices of the encoder's pooling",
    "a2u": "kernels from second-order features of the encoder",
    "max-unpooling": "maxima back to where they were",
}
# What belongs to an encoder-decoder: its kernels come from the encoder's map, and so it is no
# choice for --upsampler.
_DECODERS: dict[str, tuple[type[Upsampler], Callable[[int], Any]]] = {
    IndexNet.name: (IndexNet, IndexNetConfig),
    A2U.name: (A2U, A2UConfig),
    MaxUnpooling.name: (MaxUnpooling, lambda channels: None),
}


@dataclass(frozen=True)
class Entry:
    """One method, with its default options for features of so many channels.

    Attributes:
        kind: ``"free"`` (no training), ``"head"`` (trained for a backbone), ``"universal"``
            (trained for any), or ``"decoder"`` (a part of an encoder-decoder).
        guidance: ``"picture"``, ``"encoder"`` or ``""``.
        ratio: ``"any"``, or the only one, such as ``"2"``.
        linear: any affine map may be applied before it.
        cost: of one picture at the sizes asked for; a decoder's at twice the cells.
    """

    name: str
    kind: str
    guidance: str
    ratio: str
    linear: bool
    cost: Cost
    description: str


def catalogue(channels: int, cells: tuple[int, int], pixels: tuple[int, int]) -> list[Entry]:
    """All methods, for features ``[C, h, w]`` upsampled to ``H x W``."""
    found = []
    for name, kind in TRAINING_FREE.items():
        price = training_free_cost(name, channels, cells, pixels)
        found.append(_entry(name, "free", kind(), price))
    for name, (kind, config_class) in LEARNED.items():
        config = config_class(**config_for(name, channels, {}))
        if issubclass(kind, Stack):
            assert isinstance(config, StackConfig)
            price = stack_cost(kind, config, cells, pixels)
        else:
            price = cost(config, cells, pixels, channels)
        trained = "universal" if name in UNIVERSALS else "head"
        found.append(_entry(name, trained, kind(config), price))
    twice = (2 * cells[0], 2 * cells[1])
    for name, (kind, make_config) in _DECODERS.items():
        config = make_config(channels)
        if config is None:
            price, module = training_free_cost(name, channels, cells, twice), kind()
        else:
            price, module = cost(config, cells, twice), kind(config)
        found.append(_entry(name, "decoder", module, price))
    return found


def _entry(name: str, kind: str, module: Upsampler, price: Cost) -> Entry:
    guidance = ""
    if module.needs_guidance:
        guidance = "picture" if module.guidance_is_image else "encoder"
    return Entry(
        name=name,
        kind=kind,
        guidance=guidance,
        ratio="any" if module.fixed_ratio is None else str(module.fixed_ratio),
        linear=module.linear_in_value,
        cost=price,
        description=DESCRIPTIONS[name],
    )
