"""Measure a frozen backbone densely: a linear probe on CamVid, and PCA pictures.

    python weights/recipes/probe.py --weights weights/embedded.safetensors --camvid DIR \
        --pictures A.jpg B.jpg -o out/

The probe is the usual one for dense features: a 1x1 convolution on the low-resolution patch tokens,
its logits upsampled bilinearly to the label map (a linear map commutes with bilinear upsampling, so
this equals a probe on bilinearly upsampled features) and mIoU from one confusion matrix over the
whole validation set, ignoring 255. It is fitted to the class fractions of each patch by L-BFGS
until converged, so that no learning rate favours one backbone.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from fmupsample.probing import Confusion

from backbone import FrozenBackbone, load_frozen, random_frozen

CAMVID = [
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "cyclist",
]


def fit_to_grid(width: int, height: int, short: int, patch: int) -> tuple[int, int]:
    """Size with short side about `short`, aspect kept, both sides multiples of the patch size."""
    scale = short / min(width, height)
    return max(1, round(width * scale / patch)) * patch, max(
        1, round(height * scale / patch)
    ) * patch


def read_rgb(path: Path, short: int, patch: int) -> torch.Tensor:
    """Picture as [3, H, W] float in 0..1, resized to the patch grid."""
    with Image.open(path) as image:
        image = image.convert("RGB")
        image = image.resize(fit_to_grid(*image.size, short, patch), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def read_split(
    root: Path, split: str, short: int, patch: int, limit: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [N, 3, H, W] and labels [N, h, w] of one CamVid split; `limit` takes that many,
    evenly spread."""
    labels = sorted((root / split / "labels").glob("*.png"))
    if limit:
        labels = [labels[i] for i in np.linspace(0, len(labels) - 1, limit).round().astype(int)]
    images = {p.stem: p for p in (root / split / "images").iterdir()}
    x = torch.stack([read_rgb(images[p.stem], short, patch) for p in labels])
    y = torch.from_numpy(np.stack([np.array(Image.open(p)) for p in labels])).long()
    return x, y


@torch.no_grad()
def extract(backbone: FrozenBackbone, images: torch.Tensor, batch: int = 8) -> torch.Tensor:
    """Final-norm patch tokens of `images` [N, 3, H, W] (0..1) as [N, C, h, w] float32."""
    return torch.cat(
        [backbone(images[i : i + batch]).float() for i in range(0, len(images), batch)]
    )


def fractions(y: torch.Tensor, h: int, w: int, classes: int) -> torch.Tensor:
    """Share of every class in each cell of an h x w grid, [N, h, w, classes]; ignored pixels count
    nowhere."""
    return torch.cat(
        [
            F.adaptive_avg_pool2d(
                F.one_hot(part.clamp(max=classes), classes + 1)[..., :classes]
                .permute(0, 3, 1, 2)
                .float(),
                (h, w),
            ).permute(0, 2, 3, 1)
            for part in y.split(16)
        ]
    )


def fit_probe(
    x: torch.Tensor,  # [N, C, h, w]
    y: torch.Tensor,  # [N, H, W]
    classes: int,
    steps: int = 150,
    decay: float = 1e-4,
) -> torch.nn.Conv2d:
    """Fit the 1x1 convolution on the patch grid by L-BFGS: deterministic, and converged for every
    backbone.

    Features are whitened first and the whitening is folded into the convolution. It only conditions
    the problem: without it the few hundred steps of a gradient method rank backbones by the spread
    of their singular values.
    """
    _, c, h, w = x.shape
    flat = x.permute(0, 2, 3, 1).reshape(-1, c)
    share = fractions(y, h, w, classes).reshape(-1, classes)
    mean = flat.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(flat.T).double())
    white = (vectors * (values.clamp(min=0) + 1e-6 * values.max()).rsqrt()).float()
    flat = (flat - mean) @ white
    weight = torch.zeros(c, classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=steps,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_change=1e-7,
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (
            -(share * F.log_softmax(flat @ weight + bias, 1)).sum() / share.sum()
            + decay * (weight**2).sum()
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    layer = torch.nn.Conv2d(c, classes, 1)
    with torch.no_grad():
        folded = white @ weight
        layer.weight.copy_(folded.T[:, :, None, None])
        layer.bias.copy_(bias - mean @ folded)
    return layer


@torch.no_grad()
def judge(layer: torch.nn.Conv2d, x: torch.Tensor, y: torch.Tensor, classes: int) -> Confusion:
    """Counts of true and predicted classes at full label resolution."""
    counts = Confusion(classes)
    for features, target in zip(x.split(1), y, strict=True):
        logits = F.interpolate(layer(features), target.shape, mode="bilinear", align_corners=False)
        counts.add(logits[0].argmax(0), target)
    return counts


def probe_camvid(
    backbone: FrozenBackbone, root: Path, short: int, limits: tuple[int, int] = (0, 0)
) -> dict:
    """Linear probe CamVid train -> val. Returns mIoU, pixel accuracy and the IoU of each class."""
    start = time.time()
    images, labels = read_split(root, "train", short, backbone.patch, limits[0])
    layer = fit_probe(extract(backbone, images), labels, len(CAMVID))
    images, labels = read_split(root, "val", short, backbone.patch, limits[1])
    counts = judge(layer, extract(backbone, images), labels, len(CAMVID))
    return {
        "miou": round(100 * counts.miou(), 2),
        "accuracy": round(100 * counts.pixel_accuracy(), 2),
        "iou": {
            name: round(100 * v, 1) for name, v in zip(CAMVID, counts.iou().tolist(), strict=True)
        },
        "short_side": short,
        "pictures": [limits[0] or 367, limits[1] or len(labels)],
        "seconds": round(time.time() - start, 1),
    }


def norm_report(backbone: FrozenBackbone, images: torch.Tensor) -> dict:
    """Spread of token norms before the final norm: artefact tokens show as a max far above the
    median.

    Darcet et al. 2024, "Vision Transformers Need Registers", find norms several times the median in
    large ViTs.
    """
    norms = backbone.raw_norms(images).flatten()
    median = norms.median()
    return {
        "median": round(median.item(), 2),
        "p99_over_median": round((norms.quantile(0.99) / median).item(), 2),
        "max_over_median": round((norms.max() / median).item(), 2),
    }


def pca_rgb(features: torch.Tensor) -> np.ndarray:
    """First three principal components of one map [C, h, w] as uint8 [h, w, 3], each stretched over
    2..98 %."""
    _, h, w = features.shape
    flat = features.flatten(1).T
    flat = flat - flat.mean(0)
    _, _, v = torch.linalg.svd(flat, full_matrices=False)
    axes = v[:3] * v[:3].sum(1, keepdim=True).sign()  # SVD signs are arbitrary: fix them
    scores = flat @ axes.T
    low, high = scores.quantile(0.02, 0), scores.quantile(0.98, 0)
    rgb = ((scores - low) / (high - low + 1e-8)).clamp(0, 1)
    return (rgb.view(h, w, 3) * 255).round().byte().numpy()


def pca_sheet(
    backbone: FrozenBackbone, paths: list[Path], short: int, tile: int = 224
) -> Image.Image:
    """Contact sheet: each picture above the PCA of its own patch features (nearest upsampling: no
    beautifying)."""
    columns = []
    for path in paths:
        rgb = read_rgb(path, short, backbone.patch)
        features = extract(backbone, rgb[None])[0]
        width = round(tile * rgb.shape[2] / rgb.shape[1])
        picture = Image.fromarray((rgb.permute(1, 2, 0) * 255).byte().numpy()).resize((width, tile))
        pca = Image.fromarray(pca_rgb(features)).resize((width, tile), Image.Resampling.NEAREST)
        columns.append(np.concatenate([np.array(picture), np.array(pca)], 0))
    return Image.fromarray(np.concatenate(columns, 1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, help="safetensors written by train_backbone.py")
    parser.add_argument(
        "--untrained",
        type=Path,
        help="instead of --weights: the architecture of this file as timm starts it",
    )
    parser.add_argument(
        "--camvid", type=Path, help="folder with train/ and val/, each with images/ and labels/"
    )
    parser.add_argument(
        "--pictures", type=Path, nargs="*", default=[], help="pictures for the PCA sheet"
    )
    parser.add_argument(
        "--short", type=int, nargs="*", default=[448], help="short side of the input, in pixels"
    )
    parser.add_argument(
        "--limits", type=int, nargs=2, default=[0, 0], help="CamVid train and val pictures, 0 = all"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("probe-out"))
    args = parser.parse_args()
    if bool(args.weights) == bool(args.untrained):
        parser.error("give either --weights or --untrained")
    torch.manual_seed(args.seed)
    backbone = load_frozen(args.weights) if args.weights else random_frozen(args.untrained)
    args.output.mkdir(parents=True, exist_ok=True)
    results = []
    for short in args.short:
        if args.camvid:
            result = probe_camvid(backbone, args.camvid, short, tuple(args.limits))
            results.append(result)
            print(json.dumps(result), flush=True)
        if args.pictures:
            square = (short // backbone.patch * backbone.patch,) * 2
            rgb = [read_rgb(p, short, backbone.patch)[None] for p in args.pictures]
            sample = torch.cat([F.interpolate(x, square) for x in rgb])
            print("token norms", short, json.dumps(norm_report(backbone, sample)), flush=True)
            pca_sheet(backbone, args.pictures, short).save(args.output / f"pca-{short}.png")
    (args.output / "probe.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
