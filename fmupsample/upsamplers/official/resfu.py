"""ReSFU's official parameter names."""

from __future__ import annotations

import torch
from torch import Tensor

from fmupsample.upsamplers.official.filling import fill, required
from fmupsample.upsamplers.resfu import ReSFU, ReSFUConfig

_RESFU_NAMES = {
    "norm_x": "feature_norm",
    "norm_y": "guidance_norm",
    "q": "query",
    "k": "key",
}
_PCDC_NAMES = {
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
    "weight": "difference.weight",
    "bias": "difference.bias",
    "channel_compressor.1.weight": "mix.weight",
    "channel_compressor.1.bias": "mix.bias",
    "channel_compressor.3.weight": "mix_norm.weight",
    "channel_compressor.3.bias": "mix_norm.bias",
    "channel_compressor.4.weight": "score.weight",
    "channel_compressor.4.bias": "score.bias",
}
# A constant box kernel, stored by the official module as a buffer.
_RESFU_IGNORED = ("GF.kernel",)
_WHAT = "official ReSFU parameters"


def load_resfu(
    state: dict[str, Tensor],
    *,
    ratio: float | None = None,
    groups: int = 4,
    embedding_dim: int = 32,
    kernel_size: int = 3,
) -> ReSFU:
    renamed = {}
    for name, tensor in state.items():
        if name not in _RESFU_IGNORED:
            renamed[_resfu_name(name)] = tensor
    middle = renamed.get("semantic_scores.difference.bias", torch.empty(128)).numel()
    module = ReSFU(
        ReSFUConfig(
            channels=required(renamed, "feature_norm.weight", _WHAT).numel(),
            guidance_channels=required(renamed, "guidance_norm.weight", _WHAT).numel(),
            stem=False,
            kernel_size=kernel_size,
            embedding=embedding_dim,
            middle=middle,
            groups=groups,
        )
    )
    return fill(module, renamed, _WHAT)


def _resfu_name(name: str) -> str:
    first, _, rest = name.partition(".")
    if first in _RESFU_NAMES:
        return f"{_RESFU_NAMES[first]}.{rest}"
    if first in ("semantic_scores", "detail_scores") and rest in _PCDC_NAMES:
        return f"{first}.{_PCDC_NAMES[rest]}"
    return name
