"""A convolution in the dtype of what it is given."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """``layer(x)`` with zero padding, in the dtype of ``x``, whatever the parameters' own."""
    bias = None if layer.bias is None else layer.bias.to(x)
    weight = layer.weight.to(x)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, groups=layer.groups)
