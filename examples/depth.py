"""Monocular depth with a small encoder-decoder on timm features, and any upsampler.

In the manner of BTS and its relatives: level by level, upsampled features join those of the encoder
and are mixed by a convolution; a last upsampler, under the picture, brings the depth to its size.

python examples/depth.py --upsamplers nearest bilinear sapa resfu
"""

from __future__ import annotations

import argparse

import timm
import torch
from torch import Tensor, nn

from fmupsample.upsamplers import build_for_decoder

from scenes import Scenes, boundary, draw_scenes, fit, print_row


class DepthNet(nn.Module):
    """Pictures ``[B, 3, H, W]`` -> depth ``[B, 1, H, W]`` in 0..1.

    Args:
        upsampler: a name of ``fmupsample.upsamplers.DECODER_UPSAMPLERS``; one that does any ratio.
    """

    def __init__(self, upsampler: str, backbone: str = "test_resnet", width: int = 32) -> None:
        super().__init__()
        self.encoder = timm.create_model(backbone, features_only=True, out_indices=(0, 1, 2, 3, 4))
        channels = self.encoder.feature_info.channels()
        strides = self.encoder.feature_info.reduction()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.up = nn.ModuleList(build_for_decoder(upsampler, width, width) for _ in channels[1:])
        self.mix = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(2 * width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            )
            for _ in channels[1:]
        )
        self.depth = nn.Conv2d(width, 1, 1)
        self.last = build_for_decoder(upsampler, width, 3, strides[0])

    def forward(self, image: Tensor) -> Tensor:
        levels = [layer(x) for layer, x in zip(self.lateral, self.encoder(image), strict=True)]
        x = levels.pop()
        for up, mix, skip in zip(self.up, self.mix, reversed(levels), strict=True):
            x = mix(torch.cat([up(x, skip), skip], 1))  # of the encoder's size, odd or not
        if self.last.linear_in_value:
            depth = self.last.reassemble(self.last.kernels(x, image), self.depth(x))
        else:
            depth = self.depth(self.last(x, image))
        return depth.sigmoid()


def loss(model: nn.Module, scenes: Scenes) -> Tensor:
    return (model(scenes.image) - scenes.depth).abs().mean()


@torch.no_grad()
def measure(model: nn.Module, scenes: Scenes) -> dict[str, float]:
    """Mean absolute error, everywhere and near the boundaries of objects."""
    error = (model(scenes.image) - scenes.depth).abs()[:, 0]
    near = boundary(scenes.labels)
    return {"error": error.mean().item(), "at edges": error[near].mean().item()}


def compare(upsampler: str, steps: int, seed: int = 0) -> dict[str, float]:
    """Train with an upsampler, and measure on scenes that were not trained on."""
    torch.manual_seed(seed)
    model = DepthNet(upsampler)
    fit(model, loss, draw_scenes(64, seed=seed), steps)
    return measure(model, draw_scenes(16, seed=1000))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upsamplers", nargs="+", default=["nearest", "bilinear", "sapa"])
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args(arguments)
    for name in options.upsamplers:
        print_row(name, compare(name, options.steps))


if __name__ == "__main__":
    main()
