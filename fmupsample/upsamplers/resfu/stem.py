"""The shallow guidance stem: a picture in, a guidance map out."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class GuidanceStem(nn.Module):
    """Two 3x3 convolutions on the normalised picture, ``[B, 3, H, W]`` -> ``[B, G, H, W]``.

    Deliberately small: what is at an edge can be seen within 5 x 5 pixels, and what belongs
    together is said by the features.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.edges = nn.Conv2d(3, channels, 3)
        self.mix = nn.Conv2d(channels, channels, 3)

    def forward(self, image: Tensor) -> Tensor:
        image = F.pad(image, (2, 2, 2, 2), mode="replicate")
        hidden = F.gelu(F.conv2d(image, self.edges.weight.to(image), self.edges.bias.to(image)))
        return F.conv2d(hidden, self.mix.weight.to(image), self.mix.bias.to(image))
