"""UPLiFT's official parameters: github.com/mwalmer-umd/UPLiFT."""

from __future__ import annotations

import re

from torch import Tensor

from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.official.filling import fill, renamed, required
from fmupsample.upsamplers.uplift import UPLiFT, UPLiFTConfig

_WHAT = "the parameters of UPLiFT"
_NAMES = {
    "decoder.block_0": "coarse",
    "decoder.up_1.up": "enlarge",
    "decoder.block_1": "fine",
    "attender.conv1": "attend",
}


def load_uplift(state: dict[str, Tensor]) -> Upsampler:
    """See :func:`fmupsample.load_official`."""
    width = len(required(state, "encoder.block_0.blocks.0.conv.0.weight", _WHAT))
    skip = len(required(state, "encoder.block_4.blocks.0.conv.0.weight", _WHAT))
    first = required(state, "decoder.block_0.blocks.0.conv.0.weight", _WHAT)
    config = UPLiFTConfig(first.shape[1] - skip, width=width, guide=len(first))
    own = {
        re.sub(r"^encoder\.block_", "encoder.", name).replace(".blocks.0.conv.", ".layers."): x
        for name, x in renamed(state, _NAMES).items()
        if not name.endswith(".num_batches_tracked")
    }
    return fill(UPLiFT(config), own, _WHAT)
