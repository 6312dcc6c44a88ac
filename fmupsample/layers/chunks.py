"""Working on large maps a few channels at a time, so that what lies between stays in the cache.

On a CPU a chain of elementwise operations on a 30 MB map spends its time on memory: on reading and
writing it, and on the fresh pages behind every intermediate result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fmupsample.ops.memory import on_huge_pages

# Bytes of the map per chunk.
_CHUNK_BYTES = 2 << 20


def recorded(*tensors: Tensor) -> bool:
    """Whether autograd or a compiler looks on, so that nothing may be overwritten."""
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def over_channels(function: Callable[..., Tensor], like: Tensor, *others: Tensor) -> Tensor:
    """``function(like, *others)`` for a function that treats every channel alike and alone.

    Args:
        function: ``[B, c, H, W]`` and others with as many channels -> ``[B, c, H, W]``.
        like: ``[B, C, H, W]``, of the size of the result.
    """
    channels = like.shape[1]
    if like.device.type != "cpu" or torch.compiler.is_compiling():
        return function(like, *others)
    step = max(1, _CHUNK_BYTES // max(1, like[:, :1].numel() * like.element_size()))
    if step >= channels:
        return function(like, *others)
    parts = (
        function(*(t[:, c : c + step] for t in (like, *others))) for c in range(0, channels, step)
    )
    if recorded(like, *others):
        return torch.cat(list(parts), 1)
    out = on_huge_pages(torch.empty(like.shape, dtype=like.dtype))
    for c, part in zip(range(0, channels, step), parts, strict=True):
        out[:, c : c + step] = part
    return out
