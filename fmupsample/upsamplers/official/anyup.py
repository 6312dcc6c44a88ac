"""AnyUp's official parameters: github.com/wimmerth/anyup."""

from __future__ import annotations

import re

from torch import Tensor

from fmupsample.errors import HeadError
from fmupsample.upsamplers.anyup import AnyUp, AnyUpConfig
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.official.filling import fill, renamed, required

_WHAT = "the parameters of AnyUp"
_NAMES = {
    "image_encoder": "image",
    "query_encoder": "query_image",
    "key_encoder": "key_image",
    "key_features_encoder": "key_features",
    "aggregation": "key_joint",
    "cross_decode.conv2d": "query_around",
    "cross_decode.cross_attn.norm_q.weight": "query_norm",
    "cross_decode.cross_attn.norm_k.weight": "key_norm",
    "rope.freqs": "rotation.frequencies",
}
_LAYERS = {"0": "norm1", "2": "conv1", "3": "norm2", "5": "conv2"}  # of a residual block
_ATTENTION = "cross_decode.cross_attn.attention"


def load_anyup(
    state: dict[str, Tensor], num_heads: int = 4, window_ratio: float = 0.1
) -> Upsampler:
    """See :func:`fmupsample.load_official`."""
    weight, bias = (
        required(state, f"{_ATTENTION}.in_proj_{kind}", _WHAT) for kind in ("weight", "bias")
    )
    filters = required(state, "key_features_encoder.0.basis", _WHAT)
    e = weight.shape[-1]
    if weight.shape != (3 * e, e) or bias.shape != (3 * e,) or filters.ndim != 4:
        raise HeadError(f"{_WHAT} have shapes that are not those of its attention")
    # The attention's own values and its output are never used.
    state = {name: x for name, x in state.items() if not name.startswith(f"{_ATTENTION}.")}
    own = {_own_name(name): x for name, x in renamed(state, _NAMES).items()}
    for number, name in enumerate(("query", "key")):
        part = slice(number * e, (number + 1) * e)
        own[f"{name}.weight"], own[f"{name}.bias"] = weight[part], bias[part]
    config = AnyUpConfig(
        embedding=e,
        heads=num_heads,
        feature_kernel=filters.shape[-1],
        window_ratio=window_ratio,
    )
    return fill(AnyUp(config), own, _WHAT)


def _own_name(name: str) -> str:
    """Numbered layers of an encoder -> their names here."""
    found = re.fullmatch(r"(\w+)\.([12])\.block\.([0235])\.(weight|bias)", name)
    if found:
        encoder, block, layer, kind = found.groups()
        return f"{encoder}.blocks.{int(block) - 1}.{_LAYERS[layer]}.{kind}"
    first = re.fullmatch(r"(\w+)\.0\.(weight|basis)", name)
    if first:
        encoder, kind = first.groups()
        return f"{encoder}.filters" if kind == "basis" else f"{encoder}.first.weight"
    return name
