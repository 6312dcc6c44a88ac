"""The guidance of learned upsamplers: the picture through a stem, or a decoder's map as it is."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.errors import ShapeError
from fmupsample.upsamplers.neighbours import resized


def check_channels(
    name: str, x: Tensor, channels: int, guidance: Tensor | None, guidance_channels: int, stem: bool
) -> None:
    """Raise a ShapeError unless features and guidance have the channels a module was built for."""
    if x.shape[1] != channels:
        raise ShapeError(f"this {name} was built for {channels} channels, got {x.shape[1]}")
    expected = 3 if stem else guidance_channels
    if guidance is not None and guidance.shape[1] != expected:
        what = "the normalised picture" if stem else "a guidance map"
        raise ShapeError(
            f"this {name} takes {what} with {expected} channels, got {guidance.shape[1]}"
        )


def guidance_map(guidance: Tensor, size: tuple[int, int], stem: nn.Module | None) -> Tensor:
    """``[B, G, H, W]`` at the output size, through the stem where there is one."""
    guidance = resized(guidance, size)
    return guidance if stem is None else stem(guidance)


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
