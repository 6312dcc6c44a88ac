"""A SegFormer-style segmentation head on timm features, with any upsampler.

Xie et al., "SegFormer" (NeurIPS 2021): every level is projected to one width, upsampled to the
finest one (directly: x2, x4, x8), concatenated and fused. Here the guidance of these is the finest
level, and a last upsampler, under the picture itself, brings the class scores to its size.

python examples/segformer_head.py --upsamplers nearest bilinear sapa resfu
"""

from __future__ import annotations

import argparse

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.upsamplers import build_for_decoder

from scenes import CLASSES, Scenes, boundary, draw_scenes, fit, print_row


class SegFormerHead(nn.Module):
    """Levels ``[B, C_i, h_i, w_i]``, finest first, and a picture -> scores ``[B, classes, H, W]``.

    Args:
        channels, strides: of the levels, as timm's ``feature_info`` has them.
        upsampler: a name of ``fmupsample.upsamplers.DECODER_UPSAMPLERS``; one that does any ratio.
    """

    def __init__(
        self,
        channels: list[int],
        strides: list[int],
        classes: int,
        upsampler: str = "sapa",
        width: int = 32,
    ) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.up = nn.ModuleList(
            build_for_decoder(upsampler, width, width, stride // strides[0])
            for stride in strides[1:]
        )
        self.fuse = nn.Sequential(
            nn.Conv2d(width * len(channels), width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.classify = nn.Conv2d(width, classes, 1)
        self.last = build_for_decoder(upsampler, width, 3, strides[0])

    def forward(self, levels: list[Tensor], image: Tensor) -> Tensor:
        finest, *coarser = (layer(x) for layer, x in zip(self.project, levels, strict=True))
        # The guidance says the size: odd ones need no care.
        coarser = [up(x, finest) for up, x in zip(self.up, coarser, strict=True)]
        fused = self.fuse(torch.cat([finest, *coarser], 1))
        if not self.last.linear_in_value:
            return self.classify(self.last(fused, image))
        # Kernels come from all channels, but only the class scores are upsampled: the same result.
        return self.last.reassemble(self.last.kernels(fused, image), self.classify(fused))


class Segmenter(nn.Module):
    """A timm backbone with that head."""

    def __init__(self, upsampler: str, backbone: str = "test_resnet") -> None:
        super().__init__()
        self.backbone = timm.create_model(backbone, features_only=True, out_indices=(1, 2, 3, 4))
        info = self.backbone.feature_info
        self.head = SegFormerHead(info.channels(), info.reduction(), CLASSES, upsampler)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.backbone(image), image)


def loss(model: nn.Module, scenes: Scenes) -> Tensor:
    return F.cross_entropy(model(scenes.image), scenes.labels)


@torch.no_grad()
def measure(model: nn.Module, scenes: Scenes) -> dict[str, float]:
    """Share of wrong pixels, everywhere and near boundaries."""
    wrong = model(scenes.image).argmax(1) != scenes.labels
    near = boundary(scenes.labels)
    return {"wrong": wrong.float().mean().item(), "at edges": wrong[near].float().mean().item()}


def compare(upsampler: str, steps: int, seed: int = 0) -> dict[str, float]:
    """Train with an upsampler, and measure on scenes that were not trained on."""
    torch.manual_seed(seed)
    model = Segmenter(upsampler)
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
