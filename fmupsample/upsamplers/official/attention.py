"""Official parameter names of the upsamplers by similarity: SAPA and LDA-AQU."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.lda_aqu import LDAAQU, LDAAQUConfig
from fmupsample.upsamplers.official.filling import fill, renamed, required
from fmupsample.upsamplers.sapa import SAPA, SAPAConfig

_SAPA_NAMES = {
    "norm_y": "guidance_norm",
    "norm_x": "feature_norm",
    "q": "query",
    "qy": "query",
    "qx": "own_query",
    "k": "key",
}
_LDA_AQU_NAMES = {
    "relative_position_bias_table": "key_bias",
    "proj_q": "query",
    "proj_k": "key",
    "conv_offset.0": "offset_depthwise",
    "conv_offset.1.norm": "offset_norm",
    "conv_offset.3": "offset",
    "layer_norm.norm": "norm",
}


def load_sapa(
    state: dict[str, Tensor],
    *,
    similarity: str | None = None,
    ratio: float | None = None,
    kernel_size: int = 5,
    embedding_dim: int | None = None,
    padding: str | None = None,
) -> Upsampler:
    """``similarity`` None: gated where there is a gate. ``ratio``, ``padding`` and
    ``embedding_dim`` (it is in the shapes) say nothing new.
    """
    what = "official SAPA parameters"
    state = renamed(state, _SAPA_NAMES)
    if similarity is None:
        similarity = "gated" if "gate.weight" in state else "bilinear"
    config = SAPAConfig(
        channels=required(state, "feature_norm.weight", what).numel(),
        guidance_channels=required(state, "guidance_norm.weight", what).numel(),
        stem=False,
        similarity=similarity,
        kernel_size=kernel_size,
        embedding=len(required(state, "key.weight", what)),
        border="zeros",
    )
    return fill(SAPA(config), state, what)


load_sapa_b = partial(load_sapa, similarity="bilinear")
load_sapa_g = partial(load_sapa, similarity="gated")


def load_lda_aqu(
    state: dict[str, Tensor],
    *,
    ratio: float | None = None,
    nh: int = 1,
    n_groups: int | None = None,
    range_factor: float = 11,
    k_u: int | None = None,
    k_e: int | None = None,
    reduction_factor: int | None = None,
    rpb: bool | None = None,
) -> Upsampler:
    """Only ``nh`` (heads) and ``range_factor`` are not in the shapes. With a whole ``ratio`` the
    module does that one, as the official one does.
    """
    what = "official LDA-AQU parameters"
    state = renamed(state, _LDA_AQU_NAMES)
    hidden, channels = required(state, "query.weight", what).shape[:2]
    neighbours = required(state, "offset.bias", what).numel() // 2
    config = LDAAQUConfig(
        channels=channels,
        reduction=channels // hidden,
        kernel_size=round(neighbours**0.5),
        offset_kernel_size=required(state, "offset.weight", what).shape[-1],
        heads=nh,
        groups=hidden // len(required(state, "offset_norm.weight", what)),
        reach=range_factor,
        bias="key_bias" in state,
        mode="official",
    )
    module = fill(LDAAQU(config), state, what)
    if ratio is not None and ratio == int(ratio):
        module.fixed_ratio = int(ratio)
    return module
