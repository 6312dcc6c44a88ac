"""Normalisation over the channels of maps."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of ``[B, C, H, W]``, pixel by pixel.

    The parameters are cast to the dtype of the map.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x)
        bias = None if self.bias is None else self.bias.to(x)
        normal = F.layer_norm(x.movedim(1, -1), self.normalized_shape, weight, bias, self.eps)
        return normal.movedim(-1, 1)


def convolved(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """A convolution, its parameters in the dtype of ``x``."""
    bias = None if layer.bias is None else layer.bias.to(x)
    return F.conv2d(
        x, layer.weight.to(x), bias, layer.stride, layer.padding, layer.dilation, layer.groups
    )
