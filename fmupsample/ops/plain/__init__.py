"""Reassembly and its gradients in plain PyTorch: batched matrix products over tiles of pixels.

Pixels that lie close together read the same few low-resolution cells, so a tile of them is one
matrix product ``[V, cells] x [cells, pixels]``. There are two ways to cut the tiles:

* :mod:`.grouped`: exactly the pixels that read the same cells, with no zeros, in one large batch,
  and a copy at the end. For accelerators, and for few channels.
* :mod:`.banded`: rectangles that read more cells. Some entries of the products are zero, but they
  are written once, where they belong. For many channels on a CPU.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fmupsample.ops.plain import banded, grouped

# From so many channels on, copying a result costs more than the zeros do.
_MANY_CHANNELS = 128


def reassemble(value: Tensor, weights: Tensor, fractional: bool) -> Tensor:
    """See :func:`fmupsample.ops.reassembly.reassemble`."""
    way = _way(value)
    # A zero of the banded products times NaN or infinity is NaN: such a cell would spoil pixels
    # that do not read it. Looking costs little at low resolution.
    if way is banded and not torch.isfinite(value).all():
        way = grouped
    return way.reassemble(value, weights, fractional)


def grad_value(grad: Tensor, weights: Tensor, h: int, w: int, fractional: bool) -> Tensor:
    """Gradient for the value map ``[B, V, h, w]``, in the dtype of ``grad``."""
    return _way(grad).grad_value(grad, weights, h, w, fractional)


def grad_weights(grad: Tensor, value: Tensor, kernel_size: int, fractional: bool) -> Tensor:
    """Gradient for the weights ``[B, K*K, H, W]``, in at least float32."""
    return _way(grad).grad_weights(grad, value, kernel_size, fractional)


def _way(like: Tensor) -> ModuleType:
    # Products in half precision are fast in large batches only.
    full = like.dtype in (torch.float32, torch.float64)
    banding = like.device.type == "cpu" and full and like.shape[1] >= _MANY_CHANNELS
    return banded if banding else grouped
