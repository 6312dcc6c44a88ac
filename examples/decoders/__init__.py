"""Upsamplers that are one half of an encoder-decoder: the encoder pools with the other half.

``downsample`` pools and leaves what ``upsample`` or ``reassemble`` goes back by. They double, and
need the maps of an encoder, so they are no use for the features of a frozen backbone.
"""

from decoders.a2u import A2U, A2UConfig
from decoders.indexnet import IndexNet, IndexNetConfig
from decoders.unpooling import MaxUnpooling
from fmupsample.upsamplers import Upsampler, build_for_decoder

ENCODER_UPSAMPLERS = ("indexnet", "a2u", "max-unpooling")


def build(name: str, channels: int) -> Upsampler:
    """An upsampler for a decoder whose maps have as many channels as its encoder's.

    Args:
        name: one of :data:`ENCODER_UPSAMPLERS` or of ``fmupsample.upsamplers.DECODER_UPSAMPLERS``.
    """
    if name == "indexnet":
        return IndexNet(IndexNetConfig(channels))
    if name == "a2u":
        return A2U(A2UConfig(channels))
    if name == "max-unpooling":
        return MaxUnpooling()
    return build_for_decoder(name, channels, channels)


__all__ = [
    "A2U",
    "ENCODER_UPSAMPLERS",
    "A2UConfig",
    "IndexNet",
    "IndexNetConfig",
    "MaxUnpooling",
    "build",
]
