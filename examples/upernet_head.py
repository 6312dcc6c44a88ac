"""UPerNet and FPN segmentation heads on timm features, with any upsampler.

Xiao et al., "Unified Perceptual Parsing" (ECCV 2018); Kirillov et al., "Panoptic Feature Pyramid
Networks" (CVPR 2019). Pooled context joins the coarsest level; levels are added from coarse to fine
(x2 each), smoothed, brought to the finest one (directly: x2, x4, x8), concatenated and fused.
Neighbours are cells, so the distance between them in pixels follows the actual ratio.

python examples/upernet_head.py --upsamplers nearest sapa resfu
"""

from __future__ import annotations

import argparse
from itertools import pairwise

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.upsamplers import build_for_decoder

from scenes import CLASSES, Scenes, boundary, draw_scenes, fit, print_row


def block(channels: int, out: int, size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, size, padding=size // 2, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(),
    )


class UPerNetHead(nn.Module):
    """Levels ``[B, C_i, h_i, w_i]``, finest first, and a picture -> scores ``[B, classes, H, W]``.

    Args:
        channels, strides: of the levels, as timm's ``feature_info`` has them.
        upsampler: a name of ``fmupsample.upsamplers.DECODER_UPSAMPLERS``; one that does any ratio.
        bins: sides of the pooled grids of the coarsest level; none: an FPN head.
    """

    def __init__(
        self,
        channels: list[int],
        strides: list[int],
        classes: int,
        upsampler: str = "sapa",
        width: int = 32,
        bins: tuple[int, ...] = (1, 2),
    ) -> None:
        super().__init__()
        self.bins = bins
        self.pooled = nn.ModuleList(nn.Conv2d(channels[-1], width, 1) for _ in bins)
        inputs = [*channels[:-1], channels[-1] + width * len(bins)]
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in inputs)
        self.smooth = nn.ModuleList(block(width, width, 3) for _ in channels)
        self.down = nn.ModuleList(
            build_for_decoder(upsampler, width, width, b // a) for a, b in pairwise(strides)
        )
        self.direct = nn.ModuleList(
            build_for_decoder(upsampler, width, width, stride // strides[0])
            for stride in strides[1:]
        )
        self.fuse = block(width * len(channels), width, 1)
        self.classify = nn.Conv2d(width, classes, 1)
        self.last = build_for_decoder(upsampler, width, 3, strides[0])

    def forward(self, levels: list[Tensor], image: Tensor) -> Tensor:
        coarsest = levels[-1]
        context = [
            F.interpolate(layer(F.adaptive_avg_pool2d(coarsest, side)), coarsest.shape[2:])
            for layer, side in zip(self.pooled, self.bins, strict=True)
        ]
        levels = [*levels[:-1], torch.cat([coarsest, *context], 1)]
        levels = [layer(x) for layer, x in zip(self.lateral, levels, strict=True)]
        for i in range(len(levels) - 2, -1, -1):
            levels[i] = levels[i] + self.down[i](levels[i + 1], levels[i])
        finest, *coarser = (layer(x) for layer, x in zip(self.smooth, levels, strict=True))
        coarser = [up(x, finest) for up, x in zip(self.direct, coarser, strict=True)]
        fused = self.fuse(torch.cat([finest, *coarser], 1))
        if not self.last.linear_in_value:
            return self.classify(self.last(fused, image))
        return self.last.reassemble(self.last.kernels(fused, image), self.classify(fused))


class Segmenter(nn.Module):
    """A timm backbone with that head."""

    def __init__(self, upsampler: str, backbone: str = "test_resnet", bins=(1, 2)) -> None:
        super().__init__()
        self.backbone = timm.create_model(backbone, features_only=True, out_indices=(1, 2, 3, 4))
        info = self.backbone.feature_info
        self.head = UPerNetHead(info.channels(), info.reduction(), CLASSES, upsampler, bins=bins)

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
