"""Linear probes on a real backbone, fitted on sampled pixels and judged on all of them.

    python research/benchmarks/sampled.py --root DIR --size 336x448 --limits 90 60 \\
        --backbone dinov2-s --backbone-weights vits14.safetensors --layer 9 \\
        --methods bilinear jbu affinity 4:bilinear 4:affinity ceiling mine=head.safetensors \\
        -o results.json

A method is a name, ``NAME=FILE`` for a head file, or ``ceiling``: weights made from the true labels
(distance times the square of each cell's share of the pixel's class), about the best that weighted
cells can do. ``N:`` before it gives the backbone N shifted views.

*preserved*: a probe fitted on patch features (each sampled pixel with its cell's), applied to
upsampled ones. *fitted*: a probe fitted on upsampled features. Both are given as mIoU, mIoU within
5 pixels of an edge between classes, and boundary F (3 pixels), the mean over the seeds. Everything
is value-first: logits are upsampled, not features. Labels are PNGs, 255 ignored.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common import options, parse_options, tell_faults
from fmupsample.backbones import load_backbone
from fmupsample.labels import open_dataset
from fmupsample.training.masks import segment_shares, segments
from fmupsample.upsamplers import JointBilateral, Upsampler, load_head, load_upsampler
from judge import IGNORED, Judge
from reports import Report

SEEDS, SAMPLES, STEPS, BATCH, RATE = 3, 2048, 1500, 4096, 2e-3
SPLITS = {"train": "train", "test": "val"}
Kernels = Callable[[Tensor, Tensor, Tensor], Tensor]  # features, image, labels -> weights


class Ceiling(JointBilateral):
    """Weights from the truth; what weights of whole cells can reach, about."""

    def __init__(self) -> None:
        super().__init__(sigma_range=1e9)

    def of(self, x: Tensor, image: Tensor, labels: Tensor) -> Tensor:
        numbers = segments(labels[None])
        shares = segment_shares(numbers, tuple(x.shape[-2:]))
        own = F.one_hot(numbers.clamp_max(shares.shape[1] - 1), shares.shape[1])
        place = self.kernels(x, image)  # [1, K*K, H, W]
        reach, size = self.kernel_size // 2, image.shape[-2:]
        padded = F.pad(shares, (reach,) * 4, mode="replicate")
        rows, columns = (torch.arange(n) * m // n for n, m in zip(size, x.shape[-2:], strict=True))
        found = []
        for i in range(self.kernel_size):
            for j in range(self.kernel_size):
                near = padded[0][:, rows + i][:, :, columns + j]
                found.append((near * own[0].permute(2, 0, 1)).sum(0))
        weights = place * (torch.stack(found)[None] + 1e-4).square()
        return weights / weights.sum(1, keepdim=True)


def load_pairs(root: Path, size: tuple[int, int], limit: int) -> tuple[Tensor, Tensor]:
    """Images uint8 ``[N, 3, H, W]`` and labels int64 ``[N, H, W]``, evenly spread."""
    pairs = open_dataset(root).pairs
    pairs = pairs[:: max(1, len(pairs) // limit)][:limit]
    images, labels = [], []
    for pair in pairs:
        with Image.open(pair.source.path) as image:
            resized = image.convert("RGB").resize(size[::-1], Image.BICUBIC)
        images.append(torch.from_numpy(np.array(resized)).permute(2, 0, 1))
        with Image.open(pair.labels) as image:
            resized = image.resize(size[::-1], Image.NEAREST)
        labels.append(torch.from_numpy(np.array(resized).astype(np.int64)))
    return torch.stack(images), torch.stack(labels)


def fit(features: Tensor, labels: Tensor, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """A linear classifier ``[classes, C]`` and ``[classes]`` of features ``[N, C]``."""
    torch.manual_seed(seed)
    mean, deviation = features.float().mean(0), features.float().std(0).clamp_min(1e-6)
    scaled = (features.float() - mean) / deviation
    layer = torch.nn.Linear(features.shape[1], classes)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=RATE, weight_decay=1e-3)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        drawn = torch.randint(len(features), (BATCH,))
        loss = F.cross_entropy(layer(scaled[drawn]), labels[drawn])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weight = (layer.weight / deviation).detach()
    return weight, (layer.bias - weight @ mean).detach()


class Features:
    """Low-resolution features of all images of a split, for each number of views."""

    def __init__(self, arguments: argparse.Namespace, splits: dict[str, tuple]) -> None:
        self.arguments, self.splits = arguments, splits
        self.known: dict[tuple[int, str], tuple[Tensor, float]] = {}
        self.backbones = {}
        self.patch_probes: dict[tuple, list] = {}

    def backbone(self, views: int):
        if views not in self.backbones:
            args = self.arguments
            more = {"views": views} if views > 1 else {}
            self.backbones[views] = load_backbone(
                args.backbone, layer=args.layer, weights=args.backbone_weights, **more
            ).eval()
        return self.backbones[views]

    def images(self, split: str) -> Tensor:
        backbone = self.backbone(1)
        mean, std = (torch.tensor(v)[:, None, None] for v in (backbone.mean, backbone.std))
        return (self.splits[split][0].float() / 255 - mean) / std

    @torch.inference_mode()
    def __call__(self, views: int, split: str) -> tuple[Tensor, float]:
        """``[N, C, h, w]`` and seconds per image."""
        if (views, split) not in self.known:
            backbone, found = self.backbone(views), []
            begun = time.perf_counter()
            for image in self.images(split):
                found.append(backbone(image[None])[0])
            seconds = (time.perf_counter() - begun) / len(found)
            self.known[views, split] = torch.stack(found), seconds
        features, seconds = self.known[views, split]
        return features.clone(), seconds


def measure(name: str, features: Features, classes: int, chosen: int) -> dict:
    """The row of one method; ``chosen`` of the training images, spread out, are labelled."""
    views, _, method = name.rpartition(":") if name.split(":")[0].isdigit() else ("1", "", name)
    views = int(views)
    upsampler, kernels = contender(method, features.backbone(views))
    samples, own, targets = sample(features, views, upsampler, kernels, chosen)
    patch = features.patch_probes.get((views, chosen))
    patch = patch or [fit(own, targets, classes, seed) for seed in range(SEEDS)]
    features.patch_probes[views, chosen] = patch
    probes = [*patch, *(fit(samples, targets, classes, seed) for seed in range(SEEDS))]
    judge, kernels_seconds = judged(features, views, upsampler, kernels, probes, classes)
    rows = judge.rows()
    row = {
        "backbone_s": round(features(views, "test")[1], 3),
        "kernels_s": round(kernels_seconds, 3),
    }
    for kind, part in (("preserved", rows[:SEEDS]), ("fitted", rows[SEEDS:])):
        row[kind] = part.mean(0).round(2).tolist()
        row[f"{kind}_seeds"] = part.round(2).tolist()
    if classes == 2:
        row["foreground"] = judge.foreground().round(2).tolist()
    return row


def sample(
    features: Features, views: int, upsampler: Upsampler, kernels: Kernels, chosen: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Upsampled features ``[N, C]`` at drawn pixels, those of their cells, and labels ``[N]``."""
    low, _ = features(views, "train")
    images, labels = features.images("train"), features.splits["train"][1]
    take = range(0, len(labels), max(1, len(labels) // chosen))[:chosen]
    generator = torch.Generator().manual_seed(0)
    samples, own, targets = [], [], []
    with torch.inference_mode():
        for i in range(len(labels)):
            known = (labels[i].flatten() != IGNORED).nonzero()[:, 0]
            drawn = known[torch.randint(len(known), (SAMPLES,), generator=generator)]
            if i not in take:
                continue
            weights = kernels(low[i : i + 1], images[i : i + 1], labels[i])
            samples.append(upsampler.reassemble_at(weights[0], low[i], drawn).half())
            own.append(in_cells(low[i], drawn, labels.shape[-2:]).half())
            targets.append(labels[i].flatten()[drawn])
    # Copies: probes are fitted outside inference mode.
    return torch.cat(samples).clone(), torch.cat(own).clone(), torch.cat(targets).clone()


def judged(
    features: Features,
    views: int,
    upsampler: Upsampler,
    kernels: Kernels,
    probes: list[tuple[Tensor, Tensor]],
    classes: int,
) -> tuple[Judge, float]:
    """What the probes make of the test images, and the median seconds of kernel weights."""
    weight, bias = torch.cat([w for w, _ in probes]), torch.cat([b for _, b in probes])
    judge, seconds = Judge(len(probes), classes), []
    low, _ = features(views, "test")
    images, labels = features.images("test"), features.splits["test"][1]
    with torch.inference_mode():
        for i in range(len(labels)):
            begun = time.perf_counter()
            weights = kernels(low[i : i + 1], images[i : i + 1], labels[i])
            seconds.append(time.perf_counter() - begun)
            logits = F.conv2d(low[i : i + 1], weight[:, :, None, None], bias)
            upsampled = upsampler.reassemble(weights, logits)[0]
            judge.add(upsampled.unflatten(0, (len(probes), classes)).argmax(1), labels[i])
    return judge, float(np.median(seconds))


def in_cells(x: Tensor, pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Features ``[n, C]`` of the cells ``[C, h, w]`` that pixels lie in."""
    (height, width), (h, w) = size, x.shape[-2:]
    return x[:, pixels // width * h // height, pixels % width * w // width].T


def contender(method: str, backbone) -> tuple[Upsampler, Kernels]:
    """An upsampler, and how its weights are made."""
    if method == "ceiling":
        upsampler = Ceiling()
        return upsampler, upsampler.of
    _, _, file = method.partition("=")
    upsampler = load_head(file, backbone) if file else load_upsampler(backbone, method)
    return upsampler, lambda x, image, _: upsampler.kernels(x, image)


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__)
    add = parser.add_argument
    add("--root", type=Path, required=True, help="folder with train/ and val/")
    add("--classes", type=int, required=True)
    add("--size", required=True, help="HEIGHTxWIDTH, pixels")
    add("--limits", type=int, nargs=2, default=[90, 60], help="images to fit and to judge by")
    add("--labelled", type=int, help="fit on so many of the training images only")
    add("--backbone", default="embedded")
    add("--backbone-weights", type=Path)
    add("--layer", type=int)
    add("--methods", nargs="+", required=True)
    args = parse_options(parser, arguments)
    size = tuple(int(n) for n in args.size.split("x"))
    splits = {
        split: load_pairs(args.root / folder, size, limit)
        for (split, folder), limit in zip(SPLITS.items(), args.limits, strict=True)
    }
    features = Features(args, splits)
    setting = {
        "data": args.root.name,
        "size": args.size,
        "limits": "{} / {}".format(*args.limits),
        "labelled": args.labelled or args.limits[0],
        "backbone": features.backbone(1).name,
    }
    report = Report(args.output, torch.device("cpu"))
    for name in args.methods:
        row = measure(name, features, args.classes, setting["labelled"])
        print(
            f"{name[:40]:40s} preserved {row['preserved']} fitted {row['fitted']} "
            f"{row['kernels_s']} s",
            flush=True,
        )
        report.add({**setting, "method": name}, **row)
        report.write()


if __name__ == "__main__":
    tell_faults(main)
