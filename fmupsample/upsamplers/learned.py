"""Upsamplers with parameters, by name: what head files hold and training makes.

Each is built from one configuration object, kept as ``module.config``, which turns into a mapping
and back (``to_dict``, ``from_dict``) and has the number of feature ``channels`` among its fields, 0
for those that take any.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fmupsample.errors import FmupsampleError, UsageError
from fmupsample.upsamplers.affinity import Affinity, AffinityConfig
from fmupsample.upsamplers.anyup import AnyUp, AnyUpConfig
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.config import Config
from fmupsample.upsamplers.fade import FADE, FADEConfig
from fmupsample.upsamplers.lda_aqu import LDAAQU, LDAAQUConfig
from fmupsample.upsamplers.resfu import ReSFU, ReSFUConfig, UniversalReSFUConfig
from fmupsample.upsamplers.resfu.module import UNIVERSAL
from fmupsample.upsamplers.sapa import SAPA, SAPAConfig
from fmupsample.upsamplers.stack import (
    CARAFEStack,
    DeconvolutionStack,
    DySampleStack,
    LearnedBilateralStack,
    PixelShuffleStack,
    StackConfig,
)

LEARNED: dict[str, tuple[type[Upsampler], type[Config]]] = {
    Affinity.name: (Affinity, AffinityConfig),
    AnyUp.name: (AnyUp, AnyUpConfig),
    ReSFU.name: (ReSFU, ReSFUConfig),
    UNIVERSAL: (ReSFU, UniversalReSFUConfig),
    SAPA.name: (SAPA, SAPAConfig),
    LDAAQU.name: (LDAAQU, LDAAQUConfig),
    FADE.name: (FADE, FADEConfig),
    CARAFEStack.name: (CARAFEStack, StackConfig),
    DySampleStack.name: (DySampleStack, StackConfig),
    LearnedBilateralStack.name: (LearnedBilateralStack, StackConfig),
    DeconvolutionStack.name: (DeconvolutionStack, StackConfig),
    PixelShuffleStack.name: (PixelShuffleStack, StackConfig),
}


# What training gives a new upsampler unless any of these fields is asked for: improvements on the
# papers' own forms, measured in benchmarks/README.md.
_WHOLE_CELLS = {
    "neighbours": "coarse", "similarity": "distance", "taper": True, "sigma_range": 0.6,
}  # fmt: skip
RECOMMENDED: dict[str, dict[str, Any]] = {ReSFU.name: _WHOLE_CELLS, UNIVERSAL: _WHOLE_CELLS}

# Of these, what a head is given after its training only: trained with the colours of its prior, it
# learns to argue with them.
LATE: dict[str, tuple[str, ...]] = {ReSFU.name: ("sigma_range",), UNIVERSAL: ("sigma_range",)}


# Heads that serve the features of any backbone, the best first.
UNIVERSALS = (Affinity.name, AnyUp.name, UNIVERSAL)


def recommended(name: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration to train ``name`` with, given the fields that were asked for."""
    fields = RECOMMENDED.get(name, {})
    # "stem" is the form inside decoders, which sees no picture.
    apart = fields.keys() & asked.keys() or not asked.get("stem", True)
    return dict(asked) if apart else {**fields, **asked}


def config_for(name: str, channels: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`build_learned` takes, for features of so many channels."""
    return {"channels": 0 if name in UNIVERSALS else channels, **options}


def build_learned(name: str, config: Mapping[str, Any]) -> Upsampler:
    """A new upsampler with untrained parameters.

    Raises:
        UsageError: no such upsampler, or a configuration it does not take.
    """
    if name not in LEARNED:
        raise UsageError(f"{name!r} is not an upsampler with parameters: {', '.join(LEARNED)}")
    module, config_class = LEARNED[name]
    try:
        return module(config_class.from_dict(dict(config)))
    except FmupsampleError:
        raise
    # What numbers that cannot be lead to: groups of 0, channels of -1, words for numbers.
    except (TypeError, ValueError, ArithmeticError, RuntimeError, AttributeError) as error:
        raise UsageError(f"the configuration of {name} is unusable: {error}") from error
