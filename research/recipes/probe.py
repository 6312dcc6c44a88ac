"""How much a backbone knows at its own resolution: a linear probe of single patches.

    python research/recipes/probe.py camvid/train camvid/val --classes 11 --grid 25x34
    python research/recipes/probe.py ccp/train ccp/val --classes 13 --grid 34x22 \
        --backbone dinov2-s --weights vits14.safetensors --layer 9

Each folder holds ``images`` and ``labels`` (PNG, a class a pixel). Images are resized to the grid
of patches, and a patch counts if one class has half of its pixels or more. A linear classifier of
the standardised features is fitted on the first folder; mIoU is measured on the second, from one
confusion matrix, the mean of two seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import fmupsample
from fmupsample.probing import Confusion

IGNORED = 255


def read_patches(
    backbone: fmupsample.Backbone, folder: Path, count: int, grid: tuple[int, int], classes: int
) -> tuple[Tensor, Tensor]:
    """Features [N, C] and classes [N] of the patches of ``count`` images, evenly spread."""
    files = sorted((folder / "images").iterdir())
    files = files[:: max(1, len(files) // count)][:count]
    (rows, columns), (high, wide) = grid, backbone.stride
    size = columns * wide, rows * high
    mean, std = (torch.tensor(v)[:, None, None] for v in (backbone.mean, backbone.std))
    features, targets = [], []
    for file in files:
        with Image.open(file) as image:
            pixels = np.array(image.convert("RGB").resize(size, Image.Resampling.BILINEAR))
        image = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std
        features.append(backbone(image[None])[0].flatten(1).T.float())
        with Image.open(folder / "labels" / f"{file.stem}.png") as image:
            label = np.array(image.resize(size, Image.Resampling.NEAREST)).astype(np.int64)
        cells = torch.from_numpy(label).view(rows, high, columns, wide).transpose(1, 2).flatten(2)
        found = torch.stack([(cells == k).sum(-1) for k in range(classes)], -1).max(-1)
        clear = found.values >= high * wide / 2
        targets.append(torch.where(clear, found.indices, IGNORED).flatten())
    return torch.cat(features), torch.cat(targets)


def fit(features: Tensor, targets: Tensor, classes: int, seed: int, steps: int) -> torch.nn.Linear:
    torch.manual_seed(seed)
    layer = torch.nn.Linear(features.shape[1], classes)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        rows = torch.randint(len(features), (2048,))
        loss = F.cross_entropy(layer(features[rows]), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return layer


def main(argv: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("train", type=Path)
    add("test", type=Path)
    add("--classes", type=int, required=True)
    add("--grid", required=True, help="ROWSxCOLUMNS of patches")
    add("--counts", type=int, nargs=2, default=[90, 80], help="images to fit and to test on")
    add("--backbone", default="embedded")
    add("--weights", type=Path)
    add("--layer", type=int)
    add("--steps", type=int, default=1500)
    args = parser.parse_args(argv)
    backbone = fmupsample.load_backbone(args.backbone, weights=args.weights, layer=args.layer)
    backbone = backbone.eval()
    rows, columns = map(int, args.grid.split("x"))
    with torch.inference_mode():
        (x, y), (u, v) = (
            read_patches(backbone, folder, count, (rows, columns), args.classes)
            for folder, count in zip((args.train, args.test), args.counts, strict=True)
        )
    x, y, u, v = (tensor.clone() for tensor in (x, y, u, v))  # for use outside inference mode
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    x, u = (x - mean) / std, (u - mean) / std
    x, y = x[y != IGNORED], y[y != IGNORED]
    scores = []
    for seed in range(2):
        layer = fit(x, y, args.classes, seed, args.steps)
        counts = Confusion(args.classes)
        counts.add(layer(u).argmax(1)[None], v[None])
        scores.append(100 * counts.miou())
    print(f"{backbone.name}, {args.test}: {np.mean(scores):.1f} mIoU")
    return float(np.mean(scores))


if __name__ == "__main__":
    main()
