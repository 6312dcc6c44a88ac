"""The guidance of learned upsamplers: the picture through a stem, or a decoder's map as it is."""

from __future__ import annotations

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
