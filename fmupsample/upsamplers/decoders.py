"""Upsamplers as parts of a decoder, by name: one word chooses the method."""

from __future__ import annotations

from math import ceil, log2
from typing import Any

from fmupsample.errors import UsageError
from fmupsample.upsamplers.a2u import A2U, A2UConfig
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.classic import Bicubic, Bilinear, Nearest
from fmupsample.upsamplers.fade import FADE, FADEConfig
from fmupsample.upsamplers.indexnet import IndexNet, IndexNetConfig
from fmupsample.upsamplers.lda_aqu import LDAAQU, LDAAQUConfig
from fmupsample.upsamplers.resfu import ReSFU, ReSFUConfig
from fmupsample.upsamplers.sapa import SAPA, SAPAConfig
from fmupsample.upsamplers.stack import (
    CARAFEStack,
    DeconvolutionStack,
    DySampleStack,
    LearnedBilateralStack,
    PixelShuffleStack,
    StackConfig,
)
from fmupsample.upsamplers.unpooling import MaxUnpooling

_PLAIN = {kind.name: kind for kind in (Nearest, Bilinear, Bicubic, MaxUnpooling)}
# With a guidance map of so many channels.
_GUIDED = {
    ReSFU.name: (ReSFU, ReSFUConfig),
    SAPA.name: (SAPA, SAPAConfig),
    FADE.name: (FADE, FADEConfig),
}
_ENCODERS = {IndexNet.name: (IndexNet, IndexNetConfig), A2U.name: (A2U, A2UConfig)}
_STACKS = {
    kind.name: kind
    for kind in (
        CARAFEStack,
        DySampleStack,
        LearnedBilateralStack,
        DeconvolutionStack,
        PixelShuffleStack,
    )
}
DECODER_UPSAMPLERS = (*_PLAIN, *_GUIDED, LDAAQU.name, *_STACKS, *_ENCODERS)


def build_for_decoder(
    name: str, channels: int, guidance_channels: int, ratio: int = 2, **options: Any
) -> Upsampler:
    """An upsampler with new parameters, called as ``up(x, guidance)`` whatever its method.

    The guidance is the map with the size that is wanted: a lateral of an FPN, the encoder's map, or
    the normalised picture (3 channels). It says the size, also where the method does not look at
    it, so odd sizes fit.

    Args:
        name: one of :data:`DECODER_UPSAMPLERS`.
        channels: of the features, and of the result.
        guidance_channels: of the guidance.
        ratio: how many times, about: what stacks of doubling operators are built for. The others do
            any ratio, but ``indexnet``, ``a2u`` and ``max-unpooling``, which do 2.
        options: of the method's own configuration (a stack: of its operator's).

    Raises:
        UsageError: no such name or option, or a ratio below 1.
    """
    if ratio < 1:
        raise UsageError(f"build_for_decoder: the ratio must be 1 or more, not {ratio}")
    try:
        return _build(name, channels, guidance_channels, ratio, options)
    except TypeError as error:
        raise UsageError(f"the configuration of {name} is unusable: {error}") from error


def _build(
    name: str, channels: int, guidance_channels: int, ratio: int, options: dict[str, Any]
) -> Upsampler:
    if name in _PLAIN:
        return _PLAIN[name](**options)
    common = {"channels": channels, "guidance_channels": guidance_channels}
    if name in _GUIDED:
        kind, config = _GUIDED[name]
        return kind(config.from_dict({**common, "stem": False, **options}))
    if name in _ENCODERS:
        kind, config = _ENCODERS[name]
        return kind(config.from_dict({**common, **options}))
    if name == LDAAQU.name:
        return LDAAQU(LDAAQUConfig.from_dict({"channels": channels, **options}))
    if name in _STACKS:
        if name == LearnedBilateralStack.name:
            options = {"guidance_channels": guidance_channels, **options}
        stages = max(1, ceil(log2(ratio)))
        return _STACKS[name](StackConfig(channels, stages=stages, operator=options))
    raise UsageError(f"{name!r} is none of {', '.join(DECODER_UPSAMPLERS)}")
