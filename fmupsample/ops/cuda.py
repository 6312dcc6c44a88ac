"""The operators through the CUDA extension; the extension must be loaded.

Kernel sizes above 7 have no kernel and are computed in plain PyTorch on the same device.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from fmupsample.ops import plain

_LARGEST_KERNEL = 7
_NAMESPACE = "fmupsample_cuda"


def _ops():
    return getattr(torch.ops, _NAMESPACE)


def reassemble(value: Tensor, weights: Tensor, fractional: bool) -> Tensor:
    """See :func:`fmupsample.ops.reassembly.reassemble`."""
    if isqrt(weights.shape[1]) > _LARGEST_KERNEL:
        return plain.reassemble(value, weights, fractional)
    return _ops().reassemble(value, weights, fractional)


def grad_value(grad: Tensor, weights: Tensor, h: int, w: int, fractional: bool) -> Tensor:
    """Gradient for the value map ``[B, V, h, w]``, in the dtype of ``grad``."""
    if isqrt(weights.shape[1]) > _LARGEST_KERNEL:
        return plain.grad_value(grad, weights, h, w, fractional)
    return _ops().grad_value(grad, weights, h, w, fractional)


def grad_weights(grad: Tensor, value: Tensor, kernel_size: int, fractional: bool) -> Tensor:
    """Gradient for the weights ``[B, K*K, H, W]``, in at least float32."""
    if kernel_size > _LARGEST_KERNEL:
        return plain.grad_weights(grad, value, kernel_size, fractional)
    return _ops().grad_weights(grad, value, kernel_size, fractional)


def partial_scores(
    query: Tensor,
    key: Tensor | None,
    stride: tuple[int, int],
    low: Tensor | None,
    key_weight: Tensor | None,
    query_weight: Tensor,
    offset: Tensor,
    mix_weight: Tensor,
    mix_bias: Tensor,
    score_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Neighbour scores before their GroupNorm, in one pass; float32, no gradient.

    For the paper's sizes only: E = 32 embedding and M = 128 middle channels in g = 4 groups, K = 3,
    8 norm groups.

    Args:
        query: ``[B, E, H, W]``.
        key: ``[B, E, H, W]``, neighbours ``stride`` pixels apart, with key_weight; or None,
        low: ``[B, M, h+2, w+2]``, what the keys' convolution gives at low resolution.
        key_weight: ``[B, g, K*K * E/g, M/g]``.
        query_weight: ``[B, g, E/g, M/g]``, to be added.
        offset: ``[B, M]``, of the middle channels.
        mix_weight: ``[g, M/g (from), M/g (to)]``; mix_bias: ``[M]``.
        score_weight: ``[M, K*K]``, the norm's gain multiplied in.

    Returns:
        shares of the scores per norm group ``[B, 8, K*K, H, W]``; mean and (biased) variance of the
        mixed channels per norm group, each ``[B, 8]``.
    """
    partial, sums = _ops().partial_scores(
        query.contiguous(),
        None if key is None else key.contiguous(),
        *stride,
        None if low is None else low.contiguous(),
        None if key_weight is None else key_weight.contiguous(),
        query_weight.contiguous(),
        offset.contiguous(),
        mix_weight.contiguous(),
        mix_bias.contiguous(),
        score_weight.contiguous(),
    )
    count = query.shape[2] * query.shape[3] * offset.shape[1] // partial.shape[1]
    mean, square = (sums.sum(1) / count).unbind(2)
    variance = (square - mean * mean).clamp_min(0)
    return partial, mean.float(), variance.float()
