"""NAF's official parameters: github.com/valeoai/NAF."""

from __future__ import annotations

import re

from torch import Tensor

from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.naf import NAF, NAFConfig
from fmupsample.upsamplers.official.filling import encoder_layer, fill, renamed, required

_WHAT = "the parameters of NAF"
_NAMES = {
    "image_encoder.encoder": "pointwise",
    "image_encoder.sem_encoder": "spatial",
    "image_encoder.rope": "rotation",
}


def load_naf(state: dict[str, Tensor], heads_attn: int = 4, kernel_size: int = 9) -> Upsampler:
    """See :func:`fmupsample.load_official`."""
    half = len(required(state, "image_encoder.encoder.0.weight", _WHAT))
    periods = required(state, "image_encoder.rope.periods", _WHAT)
    own = {encoder_layer(name): x for name, x in renamed(state, _NAMES).items()}
    config = NAFConfig(
        embedding=2 * half,
        heads=heads_attn,
        rotary_heads=2 * half // (4 * max(1, len(periods))),
        kernel_size=kernel_size,
        blocks=len({m[1] for n in own if (m := re.match(r"spatial\.blocks\.(\d+)\.", n))}) or 1,
    )
    return fill(NAF(config), own, _WHAT)
