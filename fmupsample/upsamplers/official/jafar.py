"""JAFAR's official parameters: github.com/PaulCouairon/JAFAR."""

from __future__ import annotations

import re

from torch import Tensor

from fmupsample.errors import HeadError
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.jafar import JAFAR, JAFARConfig
from fmupsample.upsamplers.official.filling import fill, renamed, required

_WHAT = "the parameters of JAFAR"
_NAMES = {
    "image_encoder": "image",
    "query_encoder": "query_image",
    "key_encoder": "key_image",
    "key_features_encoder": "key_features",
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


def load_jafar(state: dict[str, Tensor], num_heads: int = 4) -> Upsampler:
    """See :func:`fmupsample.load_official`."""
    bias = required(state, f"{_ATTENTION}.in_proj_bias", _WHAT)
    first = required(state, "key_features_encoder.0.weight", _WHAT)
    e = len(first)
    if f"{_ATTENTION}.in_proj_weight" in state:  # features of E channels
        weights = state[f"{_ATTENTION}.in_proj_weight"].split(e)[:2]
    else:
        weights = [required(state, f"{_ATTENTION}.{n}_proj_weight", _WHAT) for n in "qk"]
    if bias.shape != (3 * e,) or any(weight.shape != (e, e) for weight in weights):
        raise HeadError(f"{_WHAT} have shapes that are not those of its attention")
    state = {name: x for name, x in state.items() if not name.startswith(_UNUSED)}
    own = {_own_name(name): x for name, x in renamed(state, _NAMES).items()}
    for name, weight, part in zip(("query", "key"), weights, bias.split(e)[:2], strict=True):
        own[f"{name}.weight"], own[f"{name}.bias"] = weight, part
    config = JAFARConfig(channels=first.shape[1], embedding=e, heads=num_heads)
    return fill(JAFAR(config), own, _WHAT)


def _own_name(name: str) -> str:
    """Numbered layers of an encoder -> their names here."""
    found = re.fullmatch(r"(\w+)\.([12])\.((?:norm|conv)[12]\.\w+)", name)
    if found:
        encoder, block, layer = found.groups()
        return f"{encoder}.blocks.{int(block) - 1}.{layer}"
    return re.sub(r"^(\w+)\.0\.weight$", r"\1.first.weight", name)
