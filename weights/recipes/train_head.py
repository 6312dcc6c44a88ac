"""Train a ReSFU head for a frozen backbone on unlabelled pictures, and write it as a head file.

    python weights/recipes/train_head.py --images DIR ... -o weights/embedded.resfu.safetensors

Needs scikit-image besides the package (for the pictures' regions). About 3 minutes on a data-centre
GPU with the defaults; on two CPU cores use ``--batch-size 2 --steps 800`` (about an hour).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from math import cos, pi
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import fmupsample

from head_objective import Standardise, head_loss, split_into_blocks
from pictures import list_pictures, squares_of


def regions_of(square: np.ndarray) -> np.ndarray:
    """Graph-based regions of a uint8 picture ``[3, S, S]``, int16 ``[S, S]``."""
    from skimage.segmentation import felzenszwalb

    return felzenszwalb(square.transpose(1, 2, 0), scale=80, sigma=0.6, min_size=30).astype("i2")


def load(folders: list[Path], side: int, limit: int, workers: int) -> tuple[Tensor, Tensor]:
    """Squares uint8 ``[N, 3, side, side]`` and their regions int16 ``[N, side, side]``."""
    files = [path for folder in folders for path in list_pictures(folder)]
    if limit and len(files) > limit:
        files = [files[i] for i in np.linspace(0, len(files) - 1, limit).round().astype(int)]
    squares = [square for path in files for square in squares_of(path, side)]
    with ProcessPoolExecutor(workers) as pool:
        regions = list(pool.map(regions_of, squares, chunksize=8))
    return torch.from_numpy(np.stack(squares)), torch.from_numpy(np.stack(regions))


class Crops:
    """Random square crops at two sizes, with the regions of the smaller one."""

    def __init__(self, squares: Tensor, regions: Tensor, backbone, device: torch.device, seed: int):
        self.squares, self.regions = squares.to(device), regions.to(device)
        self.mean = torch.tensor(backbone.mean, device=device)[:, None, None]
        self.std = torch.tensor(backbone.std, device=device)[:, None, None]
        self.random = np.random.default_rng(seed)

    def __call__(self, batch: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised crops ``[B, 3, size, size]``, twice as large ones, regions of the former."""
        side = self.squares.shape[-1]
        crop = int(side * self.random.uniform(0.55, 1))
        pictures, regions = [], []
        for i in self.random.integers(0, len(self.squares), batch):
            y, x = self.random.integers(0, side - crop + 1, 2)
            window = (..., slice(y, y + crop), slice(x, x + crop))
            flip = [-1] if self.random.random() < 0.5 else []
            pictures.append(self.squares[int(i)][window].flip(flip))
            regions.append(self.regions[int(i)][window].flip(flip))
        picture = (torch.stack(pictures).float() / 255 - self.mean) / self.std
        region = F.interpolate(torch.stack(regions)[:, None].float(), size=(size, size))
        resized = [
            F.interpolate(picture, size=(s, s), mode="bicubic", antialias=True)
            for s in (size, 2 * size)
        ]
        return resized[0], resized[1], region[:, 0].long()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 5 % of the steps, then a cosine to a hundredth."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.01 + 0.99 * 0.5 * (1 + cos(pi * (step - warm) / max(1, steps - warm))))


def train(args: argparse.Namespace, backbone, device: torch.device) -> Iterator[tuple[int, dict]]:
    """Yield ``(step, state)``: losses as it goes; the averaged head is in the last one."""
    squares, regions = load(args.images, args.side, args.limit, args.workers)
    print(f"{len(squares)} squares, {int(regions.max()) + 1} regions at most", flush=True)
    held_out = max(8, len(squares) // 50)
    crops = Crops(squares[held_out:], regions[held_out:], backbone, device, args.seed)
    held = Crops(squares[:held_out], regions[:held_out], backbone, device, args.seed + 1)
    multiple = backbone.size_multiple[0]
    sizes = [round(s / multiple) * multiple for s in args.sizes]

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return backbone(images).float()

    standardise = Standardise(torch.cat([features(crops(8, sizes[0])[1]) for _ in range(8)]))
    config = fmupsample.ReSFUConfig(channels=backbone.channels, **json.loads(args.config))
    head = fmupsample.ReSFU(config)
    if args.init:
        head.load_state_dict(fmupsample.load_upsampler(backbone, args.init).state_dict())
    head = head.to(device)
    average = deepcopy(head).requires_grad_(False)
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=1e-2)

    def losses(module, source: Crops, batch: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        image, enlarged, region = source(batch, size)
        region = split_into_blocks(region, round(args.block * backbone.stride[0]))
        low, fine = standardise(features(image)), standardise(features(enlarged))
        # Standardising commutes with upsampling; the keys see the backbone's own features.
        weights = module.kernels(low / standardise.rstd + standardise.mean, image)
        terms = head_loss(module.reassemble(weights, low), low, fine, region, args.region_share)
        with torch.no_grad():
            plain = F.interpolate(low, size=image.shape[-2:], mode="bilinear")
            reference = head_loss(plain, low, fine, region, args.region_share)
        return *terms, torch.stack([*terms]).detach() / torch.stack(reference)

    start = time.time()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        consistency, region, relative = losses(
            head, crops, args.batch_size, sizes[step % len(sizes)]
        )
        loss = consistency + args.region_weight * region
        if not torch.isfinite(loss):
            raise SystemExit(f"the loss is {loss.item()} at step {step}: lower --lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            decay = min(0.998, (step + 1) / (step + 10))
            for mean, value in zip(average.parameters(), head.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        if step % args.report == 0 or step == args.steps - 1:
            yield step, {"vs_bilinear": relative.tolist(), "seconds": time.time() - start}
    average.eval()
    with torch.no_grad():
        final = [losses(average, held, 8, sizes[0])[2] for _ in range(8)]
    yield args.steps, {"head": average, "held_out_vs_bilinear": torch.stack(final).mean(0).tolist()}


def recipe_line() -> str:
    """The command that made this head, paths outside the repository cut to their last part."""
    words = [Path(w).name if Path(w).is_absolute() else w for w in sys.argv[1:]]
    return shlex.join(["python", f"weights/recipes/{Path(sys.argv[0]).name}", *words])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, nargs="+", required=True)
    parser.add_argument("--backbone", default="embedded")
    parser.add_argument("--backbone-weights", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="go on from this head")
    parser.add_argument("--config", default="{}", help="JSON of ReSFUConfig fields")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 320], help="crops, in pixels")
    parser.add_argument("--side", type=int, default=352, help="pictures are kept as such squares")
    parser.add_argument("--limit", type=int, default=0, help="take so many pictures, evenly spread")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--region-weight", type=float, default=1.0)
    parser.add_argument("--region-share", type=float, default=0.8)
    parser.add_argument("--block", type=float, default=2.0, help="of a region target, in cells")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--report", type=int, default=50)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.manual_seed(args.seed)
    from fmupsample.device import resolve_device

    device = resolve_device(args.device)
    torch.set_float32_matmul_precision("high")
    backbone = fmupsample.load_backbone(args.backbone, weights=args.backbone_weights).to(device)
    start = time.time()
    for step, state in train(args, backbone, device):
        if "head" not in state:
            print(json.dumps({"step": step, **state}), flush=True)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    card = {
        "data": f"{', '.join(folder.name for folder in args.images)}; no labels",
        "recipe": recipe_line(),
        "steps": args.steps,
        "seed": args.seed,
        "hardware": where,
        "seconds": round(time.time() - start),
        "held_out_loss_vs_bilinear": {
            name: round(value, 4)
            for name, value in zip(
                ("consistency", "regions"), state["held_out_vs_bilinear"], strict=True
            )
        },
    }
    fmupsample.save_head(args.output, state["head"], backbone, card)
    print(json.dumps(card, indent=1))


if __name__ == "__main__":
    main()
