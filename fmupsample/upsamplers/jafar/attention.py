"""Attention of pixels to all cells, averaged over heads, a few pixels at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fmupsample.layers.chunks import recorded
from fmupsample.ops.memory import on_huge_pages

# Bytes of the scores made at once on a processor, and on an accelerator.
_SCORE_BYTES = {"cpu": 2 << 20}
_SCORE_BYTES_ACCELERATOR = 256 << 20


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Values of the cells, weighed by each pixel's attention to them.

    The weights of a chunk of pixels are made, used and dropped; with gradients they are made again
    in the backward pass.

    Args:
        query: ``[E, n]``, any floating dtype.
        key: ``[E, cells]``, scaled; computed in its dtype.
        value: ``[V, cells]``, in the dtype of the keys.
        heads: how many the E channels are split into.

    Returns:
        ``[V, n]``, in the dtype of the keys.
    """
    budget = _SCORE_BYTES.get(key.device.type, _SCORE_BYTES_ACCELERATOR)
    step = max(1, budget // (heads * key.shape[1] * key.element_size()))
    starts = range(0, query.shape[1], step)
    if recorded(query, key, value):
        parts = [
            checkpoint(_attend, query[:, i : i + step], key, value, heads, use_reentrant=False)
            for i in starts
        ]
        return torch.cat(parts, 1)
    out = on_huge_pages(value.new_empty(len(value), query.shape[1]))
    for i in starts:
        part = slice(i, i + step)
        torch.mm(value, attention_weights(query[:, part], key, heads).T, out=out[:, part])
    return out


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    return value @ attention_weights(query, key, heads).T


def attention_weights(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """The weight of each cell for each pixel, ``[n, cells]``; arguments as above."""
    query, key = (t.unflatten(0, (heads, -1)) for t in (query.to(key.dtype), key))
    weights = torch.bmm(query.transpose(1, 2), key).softmax(2)  # [heads, n, cells]
    if recorded(weights):
        return weights.mean(0)
    found = weights[0]
    for one in weights[1:]:
        found.add_(one)
    return found.mul_(1 / heads)
