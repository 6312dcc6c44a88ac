"""Modules with the parameters of the authors' own code.

Researchers have checkpoints trained with the official implementations; these load them under their
own parameter names and reproduce their outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fmupsample.errors import HeadError, UsageError
from fmupsample.upsamplers.base import Upsampler
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


def load_official(kind: str, state_dict: Mapping[str, Tensor], **config) -> Upsampler:
    """Build an upsampler from an official implementation's parameters.

    Args:
        kind: ``"resfu"``.
        state_dict: the official parameter names and tensors.
        config: the official configuration; for ReSFU ``ratio`` (ignored: the ratio comes from the
            sizes), ``groups``, ``embedding_dim``, ``kernel_size``.

    Returns:
        the module, in evaluation mode, with the dtype of the given parameters. Call it as
        ``up(features, guidance)``.

    Raises:
        UsageError: an unknown kind or configuration key.
        HeadError: parameters missing, left over, or of other shapes.
    """
    builders: dict[str, Callable[..., Upsampler]] = {"resfu": _load_resfu}
    if kind not in builders:
        raise UsageError(f"load_official knows {sorted(builders)}, not {kind!r}")
    return builders[kind](dict(state_dict), **config)


def _load_resfu(
    state: dict[str, Tensor],
    *,
    ratio: float | None = None,
    groups: int = 4,
    embedding_dim: int = 32,
    kernel_size: int = 3,
    kind: str = "resfu",
) -> ReSFU:
    renamed = {}
    for name, tensor in state.items():
        if name not in _RESFU_IGNORED:
            renamed[_resfu_name(name)] = tensor
    for name in ("feature_norm.weight", "guidance_norm.weight"):
        if name not in renamed:
            raise HeadError(f"official ReSFU parameters lack the one for {name}")
    middle = renamed.get("semantic_scores.difference.bias", torch.empty(128)).numel()
    module = ReSFU(
        ReSFUConfig(
            channels=renamed["feature_norm.weight"].numel(),
            guidance_channels=renamed["guidance_norm.weight"].numel(),
            stem=False,
            kernel_size=kernel_size,
            embedding=embedding_dim,
            middle=middle,
            groups=groups,
        )
    )
    return _fill(module, renamed, "official ReSFU parameters")


def _resfu_name(name: str) -> str:
    first, _, rest = name.partition(".")
    if first in _RESFU_NAMES:
        return f"{_RESFU_NAMES[first]}.{rest}"
    if first in ("semantic_scores", "detail_scores") and rest in _PCDC_NAMES:
        return f"{first}.{_PCDC_NAMES[rest]}"
    return name


def _fill(module: Upsampler, state: Mapping[str, Tensor], what: str) -> Upsampler:
    expected = module.state_dict()
    missing = sorted(set(expected) - set(state))
    unexpected = sorted(set(state) - set(expected))
    if missing or unexpected:
        raise HeadError(f"{what} do not fit: missing {missing}, unexpected {unexpected}")
    fitted = {}
    for name, tensor in state.items():
        if tensor.numel() != expected[name].numel():
            raise HeadError(
                f"{what}: {name} has shape {list(tensor.shape)}, expected "
                f"{list(expected[name].shape)}"
            )
        fitted[name] = tensor.reshape(expected[name].shape)
    module.to(next(iter(fitted.values())).dtype)
    module.load_state_dict(fitted)
    return module.eval()
