"""Compare upsamplers by linear probes on CamVid: is a head better than bilinear, and where?

    python weights/recipes/probe_head.py --camvid DIR --upsamplers bilinear jbu resfu -o out.json

For each upsampler two probes, both 1x1 convolutions on the frozen backbone's features:

* *preserved*: fitted on the low-resolution features (probe.py), its logits upsampled. The same
  classifier for every upsampler: does upsampling keep the features what they were?
* *fitted*: trained on the upsampled features with the full-resolution labels, from the former.

Kernel weights sum to 1, so logits are computed at low resolution and reassembled: no C x H x W map.
mIoU over the whole validation set, and over the pixels within ``--band`` pixels of a label edge.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fmupsample

from probe import CAMVID, fit_probe, iou_of, read_split


def edge_band(labels: Tensor, radius: int) -> Tensor:
    """Bool ``[N, H, W]``: pixels within ``radius`` of one with another label (square window)."""
    size = 2 * radius + 1
    value = labels[:, None].float()
    high = F.max_pool2d(value, size, 1, radius)
    low = -F.max_pool2d(-value, size, 1, radius)
    return (high != low)[:, 0]


class Split:
    """Features, kernel weights (kept in half precision) and labels of one CamVid split."""

    def __init__(self, backbone, upsampler, root: Path, name: str, short: int, limit: int):
        patch = backbone.stride[0]
        images, labels = read_split(root, name, short, patch, limit)
        mean = torch.tensor(backbone.mean)[:, None, None]
        std = torch.tensor(backbone.std)[:, None, None]
        self.labels, self.size = labels, images.shape[-2:]
        features, weights = [], []
        with torch.inference_mode():
            for image in ((images - mean) / std).split(1):
                features.append(backbone(image))
                weights.append(upsampler.kernels(features[-1], image).half().contiguous())
        self.features = torch.cat(features)
        self.weights = torch.cat(weights)
        self.upsampler = upsampler

    def logits(self, layer: torch.nn.Module, index: list[int]) -> Tensor:
        """Upsampled logits at the labels' size, ``[B, classes, H, W]``."""
        low = layer(self.features[index].clone())
        weights = self.weights[index].float()
        # Half precision left the sums a little off 1.
        up = self.upsampler.reassemble(weights / weights.sum(1, keepdim=True), low)
        return F.interpolate(up, self.labels.shape[-2:], mode="bilinear", align_corners=False)


def fit_upsampled(split: Split, layer: torch.nn.Conv2d, epochs: int, seed: int) -> torch.nn.Conv2d:
    """Train on from ``layer`` with full-resolution labels; AdamW, cosine over all steps."""
    # Standardised channels, so that one learning rate suits every backbone; folded back at the end.
    mean = split.features.mean((0, 2, 3))
    std = split.features.std((0, 2, 3)) + 1e-6
    weight = layer.weight.detach().flatten(1)
    bias = (layer.bias.detach() + weight @ mean).requires_grad_()
    weight = (weight * std).requires_grad_()

    def folded(x: Tensor) -> Tensor:
        scaled = weight / std
        return F.conv2d(x, scaled[:, :, None, None], bias - scaled @ mean)

    generator = torch.Generator().manual_seed(seed)
    batch, count = 4, len(split.labels)
    steps = epochs * (count // batch)
    optimizer = torch.optim.AdamW([weight, bias], lr=1e-2, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        for i in range(count // batch):
            index = order[i * batch : (i + 1) * batch].tolist()
            loss = F.cross_entropy(
                split.logits(folded, index), split.labels[index], ignore_index=255
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        scaled = weight / std
        layer = torch.nn.Conv2d(len(mean), len(bias), 1)
        layer.weight.copy_(scaled[:, :, None, None])
        layer.bias.copy_(bias - scaled @ mean)
    return layer.requires_grad_(False)


def confusion(predicted: Tensor, target: Tensor, classes: int) -> Tensor:
    """Counts ``[true, predicted]``; pixels labelled 255 count nowhere."""
    keep = target != 255
    pairs = target[keep] * classes + predicted[keep]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


@torch.no_grad()
def evaluate(split: Split, layer: torch.nn.Conv2d, band: int) -> dict[str, float]:
    classes = len(CAMVID)
    whole = torch.zeros(classes, classes, dtype=torch.int64)
    near = whole.clone()
    for i in range(len(split.labels)):
        predicted, target = split.logits(layer, [i]).argmax(1), split.labels[[i]]
        whole += confusion(predicted, target, classes)
        near += confusion(predicted, target.masked_fill(~edge_band(target, band), 255), classes)
    return {
        "miou": round(100 * iou_of(whole).nanmean().item(), 2),
        "miou_at_edges": round(100 * iou_of(near).nanmean().item(), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--camvid", type=Path, required=True)
    parser.add_argument("--backbone", default="embedded")
    parser.add_argument("--backbone-weights", type=Path)
    parser.add_argument("--upsamplers", nargs="+", default=["bilinear", "jbu", "resfu"],
                        help="names or head files")  # fmt: skip
    parser.add_argument("--short", type=int, default=336, help="short side of the input, pixels")
    parser.add_argument("--limits", type=int, nargs=2, default=[100, 50])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--band", type=int, default=5, help="pixels around label edges")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    backbone = fmupsample.load_backbone(args.backbone, weights=args.backbone_weights)
    results = {}
    for name in args.upsamplers:
        start = time.time()
        upsampler = fmupsample.load_upsampler(backbone, name)
        train, val = (
            Split(backbone, upsampler, args.camvid, split, args.short, limit)
            for split, limit in zip(("train", "val"), args.limits, strict=True)
        )
        low = fit_probe(train.features.clone(), train.labels, len(CAMVID)).requires_grad_(False)
        fitted = [
            evaluate(val, fit_upsampled(train, low, args.epochs, seed), args.band)
            for seed in range(args.seeds)
        ]
        results[name] = {"preserved": evaluate(val, low, args.band), "fitted": fitted}
        print(name, json.dumps(results[name]), f"{time.time() - start:.0f} s", flush=True)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
