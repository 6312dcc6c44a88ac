"""Any upsampler in the feature pyramid of torchvision's Faster and Mask R-CNN.

Lin et al., "Feature Pyramid Networks for Object Detection" (CVPR 2017): torchvision upsamples the
coarser level by nearest and adds it to the lateral of the finer one. Here a word chooses how, under
the guidance of that lateral; all other parameters keep their names, so checkpoints load:

    detector = torchvision.models.detection.maskrcnn_resnet50_fpn(weights="DEFAULT")
    use_upsampler(detector, "sapa")          # fine-tune it from here

python examples/torchvision_fpn.py --upsamplers nearest sapa
"""

from __future__ import annotations

import argparse
from collections import OrderedDict

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from fmupsample.upsamplers import build_for_decoder

from scenes import Scenes, boundary, draw_scenes, fit, print_row


class UpsamplingFPN(FeaturePyramidNetwork):
    """torchvision's pyramid with another way up: ``{name: [B, C_i, h_i, w_i]}``, finest first."""

    def __init__(
        self, in_channels_list: list[int], out_channels: int, upsampler: str = "sapa", **options
    ) -> None:
        super().__init__(in_channels_list, out_channels, **options)
        self.add_upsamplers(upsampler, out_channels)

    def add_upsamplers(self, upsampler: str, channels: int) -> None:
        """One for each step, from coarse to fine."""
        self.up_blocks = nn.ModuleList(
            build_for_decoder(upsampler, channels, channels) for _ in self.inner_blocks[1:]
        )

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        names, maps = list(x), list(x.values())
        inner = self.get_result_from_inner_blocks(maps[-1], -1)
        results = [self.get_result_from_layer_blocks(inner, -1)]
        for i in range(len(maps) - 2, -1, -1):
            lateral = self.get_result_from_inner_blocks(maps[i], i)
            inner = lateral + self.up_blocks[i](inner, lateral)  # of the lateral's size, odd or not
            results.insert(0, self.get_result_from_layer_blocks(inner, i))
        if self.extra_blocks is not None:
            results, names = self.extra_blocks(results, maps, names)
        return OrderedDict(zip(names, results, strict=True))


def use_upsampler(detector: nn.Module, upsampler: str) -> nn.Module:
    """Change the pyramid of a torchvision detector in place; its parameters stay as they are."""
    pyramid = detector.backbone.fpn
    pyramid.__class__ = UpsamplingFPN
    pyramid.add_upsamplers(upsampler, pyramid.layer_blocks[0][0].out_channels)
    return detector


class TimmPyramid(nn.Module):
    """A timm backbone with the pyramid, as torchvision's detectors ask for it."""

    def __init__(self, upsampler: str, backbone: str = "test_resnet", width: int = 32) -> None:
        super().__init__()
        self.body = timm.create_model(backbone, features_only=True, out_indices=(1, 2, 3, 4))
        self.fpn = UpsamplingFPN(self.body.feature_info.channels(), width, upsampler)
        self.out_channels = width

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(i): x for i, x in enumerate(self.body(image))})


def build_detector(upsampler: str, classes: int = 2, *, masks: bool = False) -> FasterRCNN:
    """A small Faster R-CNN, or Mask R-CNN, for pictures of about 64 to 128 pixels."""
    names = ["0", "1", "2", "3"]
    anchors = AnchorGenerator(tuple((size,) for size in (8, 16, 32, 64)), ((0.5, 1.0, 2.0),) * 4)
    options = {
        "rpn_anchor_generator": anchors,
        "box_roi_pool": MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
        "min_size": 64,
        "max_size": 128,
    }
    if masks:
        pool = MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2)
        return MaskRCNN(TimmPyramid(upsampler), classes, mask_roi_pool=pool, **options)
    return FasterRCNN(TimmPyramid(upsampler), classes, **options)


class Foreground(nn.Module):
    """Objects or not, read off the finest level of the pyramid.

    Not a detector: it shows in seconds what the way up does to a pyramid's map.
    """

    def __init__(self, upsampler: str) -> None:
        super().__init__()
        self.pyramid = TimmPyramid(upsampler)
        self.classify = nn.Conv2d(self.pyramid.out_channels, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        scores = self.classify(self.pyramid(image)["0"])
        return F.interpolate(scores, image.shape[2:], mode="bilinear", align_corners=False)


def loss(model: nn.Module, scenes: Scenes) -> Tensor:
    return F.binary_cross_entropy_with_logits(
        model(scenes.image), (scenes.labels > 0)[:, None].float()
    )


@torch.no_grad()
def measure(model: nn.Module, scenes: Scenes) -> dict[str, float]:
    """Share of wrong pixels, everywhere and near boundaries."""
    there = scenes.labels > 0
    wrong = (model(scenes.image)[:, 0] > 0) != there
    near = boundary(there)
    return {"wrong": wrong.float().mean().item(), "at edges": wrong[near].float().mean().item()}


def compare(upsampler: str, steps: int, seed: int = 0) -> dict[str, float]:
    """Train with an upsampler, and measure on scenes that were not trained on."""
    torch.manual_seed(seed)
    model = Foreground(upsampler)
    fit(model, loss, draw_scenes(64, seed=seed), steps)
    return measure(model, draw_scenes(16, seed=1000))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upsamplers", nargs="+", default=["nearest", "bilinear", "sapa"])
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args(arguments)
    for name in options.upsamplers:
        print_row(name, compare(name, options.steps))
    detector = build_detector(options.upsamplers[-1], masks=True).eval()
    found = detector([torch.rand(3, 75, 91)])[0]
    print(f"untrained Mask R-CNN on 75 x 91 pixels: masks {list(found['masks'].shape)}")


if __name__ == "__main__":
    main()
