"""The scores of a pair up to their GroupNorm in one CUDA kernel, where there is one.

The kernel keeps the middle channels in registers; in plain PyTorch they are the largest maps of the
whole method. It serves the paper's sizes in float32 and gives no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmupsample.layers.chunks import recorded
from fmupsample.ops import backend, cuda
from fmupsample.upsamplers.resfu.keys import FullKeys, Keys
from fmupsample.upsamplers.resfu.layers import DifferenceLayers


def serves(pair: DifferenceLayers, keys: Keys, query: Tensor) -> bool:
    """Whether the kernel can take this case; may compile the extension."""
    return (
        query.device.type == "cuda"
        and not keys.windowed
        and fits(pair, query)
        and not recorded(query, keys.source, *pair.parameters())
        and backend.compiled(query.device)
    )


def fits(pair: DifferenceLayers, query: Tensor) -> bool:
    """Whether the kernel is made for these sizes and this dtype."""
    embedding, middle = pair.norm.num_channels, pair.mix.in_channels
    sizes = (embedding, middle, pair.groups, pair.kernel_size, pair.mix_norm.num_groups)
    return sizes == (32, 128, 4, 3, 8) and query.dtype == torch.float32 and query.numel() > 0


def partial_scores(
    pair: DifferenceLayers, keys: Keys, query: Tensor, weight: Tensor, constant: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Shares of the scores per norm group, and the moments of their GroupNorm.

    Args:
        weight: ``[B, M, E/groups]``, of the query, to be added.
        constant: ``[B, M]``, to be added.

    Returns:
        ``[B, G, K*K, H, W]``; mean and variance ``[B, G]`` each.
    """
    groups = pair.groups

    def grouped(t: Tensor) -> Tensor:  # [B, M, I] -> [B, groups, I, M/groups]
        return t.unflatten(1, (groups, -1)).transpose(2, 3)

    key = low = key_weight = None
    stride = (1, 1)
    if isinstance(keys, FullKeys):
        key, stride, constant = keys.key, keys.stride, constant + keys.offset
        # Neighbours before embedding channels, as the kernel walks.
        key_weight = grouped(keys.weight.flatten(3).transpose(2, 3).flatten(2))
    else:
        low = keys.low
    score = pair.score.weight.flatten(1) * pair.mix_norm.weight
    part, mean, variance = cuda.partial_scores(
        query, key, stride, low, key_weight, grouped(weight), constant,
        pair.mix.weight.flatten(1).unflatten(0, (groups, -1)).transpose(1, 2),
        pair.mix.bias, score.T,
    )  # fmt: skip
    return part, (mean, variance)
