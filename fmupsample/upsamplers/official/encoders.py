"""Official parameters of AnyUp and JAFAR: github.com/wimmerth/anyup, github.com/PaulCouairon/JAFAR.

Both have the same encoders of the image and the same attention, of which only the projections of
queries and keys are used.
"""

from __future__ import annotations

import re

from torch import Tensor

from fmupsample.errors import HeadError
from fmupsample.upsamplers.anyup import AnyUp, AnyUpConfig
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.jafar import JAFAR, JAFARConfig
from fmupsample.upsamplers.official.filling import encoder_layer, fill, renamed, required

_NAMES = {
    "image_encoder": "image",
    "query_encoder": "query_image",
    "key_encoder": "key_image",
    "key_features_encoder": "key_features",
    "aggregation": "key_joint",
    "sft_key.gamma": "key_gain",
    "sft_key.beta": "key_shift",
    "cross_decode.conv2d": "query_around",
    "cross_decode.cross_attn.norm_q.weight": "query_norm",
    "cross_decode.cross_attn.norm_k.weight": "key_norm",
    "rope.freqs": "rotation.frequencies",
}
_ATTENTION = "cross_decode.cross_attn.attention"
# What makes the attention's own values and its output, which are never used.
_UNUSED = ("cross_decode.cross_attn.norm_v.", f"{_ATTENTION}.")
# AnyUp numbers the layers of a residual block, too.
_LAYERS = {"block.0": "norm1", "block.2": "conv1", "block.3": "norm2", "block.5": "conv2"}


def load_anyup(
    state: dict[str, Tensor], num_heads: int = 4, window_ratio: float = 0.1
) -> Upsampler:
    """See :func:`fmupsample.load_official`."""
    what = "the parameters of AnyUp"
    own = _own_parameters(state, what)
    filters = required(state, "key_features_encoder.0.basis", what)
    if filters.ndim != 4:
        raise HeadError(f"{what} have filters of shape {list(filters.shape)}")
    config = AnyUpConfig(
        embedding=len(own["query.bias"]),
        heads=num_heads,
        feature_kernel=filters.shape[-1],
        window_ratio=window_ratio,
    )
    return fill(AnyUp(config), own, what)


def load_jafar(state: dict[str, Tensor], num_heads: int = 4) -> Upsampler:
    """See :func:`fmupsample.load_official`."""
    what = "the parameters of JAFAR"
    own = _own_parameters(state, what)
    channels = required(state, "key_features_encoder.0.weight", what).shape[1]
    config = JAFARConfig(channels, embedding=len(own["query.bias"]), heads=num_heads)
    return fill(JAFAR(config), own, what)


def _own_parameters(state: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """The parameters by our names."""
    if f"{_ATTENTION}.q_proj_weight" in state:  # values have another number of channels
        weights = [required(state, f"{_ATTENTION}.{n}_proj_weight", what) for n in "qk"]
    else:
        weights = list(required(state, f"{_ATTENTION}.in_proj_weight", what).chunk(3)[:2])
    bias = required(state, f"{_ATTENTION}.in_proj_bias", what)
    e = weights[0].shape[-1]
    if any(weight.shape != (e, e) for weight in weights) or bias.shape != (3 * e,):
        raise HeadError(f"{what} have shapes that are not those of its attention")
    used = {name: x for name, x in state.items() if not name.startswith(_UNUSED)}
    own = {_own_name(name): x for name, x in renamed(used, _NAMES).items()}
    for name, weight, part in zip(("query", "key"), weights, bias.split(e)[:2], strict=True):
        own[f"{name}.weight"], own[f"{name}.bias"] = weight, part
    return own


def _own_name(name: str) -> str:
    if name == "key_features.0.basis":
        return "key_features.filters"
    return re.sub(r"block\.\d", lambda found: _LAYERS.get(found[0], found[0]), encoder_layer(name))
