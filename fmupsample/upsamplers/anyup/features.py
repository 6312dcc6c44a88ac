"""The filters of AnyUp, which features of any number of channels can pass through."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.layers.chunks import recorded
from fmupsample.upsamplers.encoders.networks import ResidualBlock

# Bytes of the filters' responses to a few channels of the features.
_RESPONSE_BYTES = 8 << 20


class FeatureEncoder(nn.Module):
    """Features of any number of channels -> ``[B, E, h, w]``.

    Each channel passes the same E filters, a softmax compares their responses, and its mean over
    channels describes a cell. The official implementation takes the C x E responses, ordered by
    channel and then filter, for E x C ones: the softmax runs over every C-th of that sequence, and
    the mean over C successive ones. The published weights are trained with that order, and so it is
    the order here. Two residual blocks follow.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.filters = nn.Parameter(torch.randn(channels, 1, kernel_size, kernel_size))
        self.blocks = nn.ModuleList(ResidualBlock(channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.described(x)
        for block in self.blocks:
            x = block(x)
        return x

    def described(self, x: Tensor) -> Tensor:
        """The mean of the softmax of the filters' responses, ``[B, C, h, w]`` -> ``[B, E, h, w]``.

        Responses are divided by how many cells of the filter lie inside the map.
        """
        (_, channels, h, w), side = x.shape, self.filters.shape[-1]
        filters = self.filters.to(x).flatten(1).T  # [side^2, E]
        pad = (side // 2,) * 4
        inside = F.pad(x.new_ones(1, 1, h, w), pad)
        inside = F.avg_pool2d(inside, side, stride=1, divisor_override=1)[0, 0, :, :, None, None]
        windows = F.pad(x, pad).unfold(2, side, 1).unfold(3, side, 1)  # [B, C, h, w, side, side]
        row = channels * w * filters.shape[1] * x.element_size()
        step = max(1, _RESPONSE_BYTES // row)
        bands = []
        for y in range(0, h, step):
            part = windows[:, :, y : y + step].permute(0, 2, 3, 1, 4, 5)
            patches = part.flatten(4) / inside[y : y + step]  # [B, rows, w, C, side^2]
            responses = torch.matmul(patches, filters).flatten(3).unflatten(3, (-1, channels))
            bands.append(_mean_softmax(responses))
        return torch.cat(bands, 1).permute(0, 3, 1, 2)


def _mean_softmax(x: Tensor) -> Tensor:
    """Softmax over the second last dimension, averaged over the last."""
    if recorded(x):
        return x.softmax(-2).mean(-1)
    x = x.sub_(x.amax(-2, keepdim=True)).exp_()
    share = (x.sum(-2) * x.shape[-1]).reciprocal_()
    return torch.matmul(x, share[..., None])[..., 0]
