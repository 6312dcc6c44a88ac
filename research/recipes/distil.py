"""Distil a vision transformer into a shallow, narrow one: how ``embedded.safetensors`` is made.

    python research/recipes/distil.py --teacher vits14.safetensors --layer 9 \
        --images imagenette224:4 photos:2 bsds500:1 camvid/train:2 ccp/train:2 --minutes 60 -o run/

The student starts from the first blocks of the teacher, their MLPs narrowed (prune.py): it has the
teacher's early features. It learns what the teacher's later blocks would make of them:

- features: a linear layer on the student's patches gives the teacher's features of a later layer,
  each channel standardised over the data, by cosine and smooth L1. The linear layer starts at the
  least-squares solution and is thrown away at the end.
- alike: the cosine similarity of any two patches of an image is that of the teacher's features, so
  that principal components and neighbours look as the teacher's do.

Teacher and student see the same crop, with the same changes of colour. The teacher's features of a
crop are used ``--reuse`` times.

A run started again with the same ``--output`` continues from its checkpoint. The schedule follows
the clock. ``publish.py`` writes the backbone file.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fmupsample
from crops import Folder, Source, middle
from prune import build_student, narrow, ridge

# Small crops at first: more different images a second. Large ones teach large grids.
PHASES = ("0.45:168x168:14", "0.3:224x224:8", "0.25:336x448:3")


@dataclass(frozen=True)
class Phase:
    """One part of the run with crops of one size."""

    share: float  # of the run
    height: int  # pixels, a multiple of the patch size
    width: int
    batch: int  # crops a step

    @staticmethod
    def parse(text: str) -> Phase:
        share, size, batch = text.split(":")
        height, width = map(int, size.split("x"))
        return Phase(float(share), height, width, int(batch))


class Pool:
    """The latest crops and the teacher's features of them.

    A crop is drawn ``reuse`` times on average.
    """

    def __init__(self, capacity: int, reuse: float):
        self.capacity, self.reuse = capacity, reuse
        self.crops: list[Tensor] = []
        self.features: list[Tensor] = []  # fp16 [N, C]
        self.count, self.used = 0, 0  # crops that came in, crops that were drawn

    @property
    def hungry(self) -> bool:
        return self.used >= self.reuse * self.count

    def add(self, crops: Tensor, features: Tensor) -> None:
        self.crops = [*self.crops, *crops][-self.capacity :]
        self.features = [*self.features, *features.half()][-self.capacity :]
        self.count += len(crops)

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        rows = torch.randperm(len(self.crops))[:n].tolist()
        self.used += n
        crops, features = ([kept[i] for i in rows] for kept in (self.crops, self.features))
        return torch.stack(crops), torch.stack(features).float()


class Student(nn.Module):
    """The network and the linear layer to the teacher's standardised features."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit = vit
        self.head = nn.Linear(vit.embed_dim, vit.embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        return patches(self.vit, images)


class Objective(nn.Module):
    """How far a student's features are from the teacher's, channels standardised over the data."""

    def __init__(self, channels: int, alike: float):
        super().__init__()
        self.alike = alike  # weight
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def fit(self, wanted: Tensor) -> None:
        flat = wanted.flatten(0, 1)
        self.mean.copy_(flat.mean(0))
        self.std.copy_(flat.std(0).clamp_min(1e-4))

    def standardise(self, wanted: Tensor) -> Tensor:
        return (wanted - self.mean) / self.std

    def forward(self, student: Student, images: Tensor, wanted: Tensor) -> dict[str, Tensor]:
        """The terms of the loss, for the teacher's features ``wanted`` [B, N, C]."""
        found = student(images)
        predicted, target = student.head(found), self.standardise(wanted)
        return {
            "cosine": 1 - F.cosine_similarity(predicted, target, dim=-1).mean(),
            "l1": F.smooth_l1_loss(predicted, target),
            "alike": self.alike * (similarity(found) - similarity(wanted)).square().mean(),
        }


def similarity(features: Tensor) -> Tensor:
    """Cosines [B, N, N] of the patches [B, N, C] of each image, less their mean."""
    unit = F.normalize(features - features.mean(1, keepdim=True), dim=-1)
    return unit @ unit.mT


class Teacher:
    """The frozen teacher as a function of uint8 crops."""

    def __init__(self, weights: Path, name: str, layer: int):
        self.backbone = fmupsample.load_backbone(name, weights=weights, layer=layer).eval()
        self.mean, self.std = (
            torch.tensor(v)[:, None, None] for v in (self.backbone.mean, self.backbone.std)
        )

    def normalise(self, crops: Tensor) -> Tensor:
        return (crops.float() / 255 - self.mean) / self.std

    @torch.no_grad()
    def __call__(self, crops: Tensor) -> Tensor:
        """Patch features [B, N, C]."""
        return torch.cat([self.backbone(i[None]).flatten(2).mT for i in self.normalise(crops)])


def patches(student: nn.Module, images: Tensor) -> Tensor:
    """Patch tokens [B, N, C] after the final norm."""
    return student.forward_features(images)[:, student.num_prefix_tokens :]


def rate(progress: float, peak: float, warmup: float = 0.05) -> float:
    """Learning rate: linear warm-up, then half a cosine down to 1 % of the peak."""
    if progress < warmup:
        return peak * max(progress / warmup, 0.02)
    along = min(1.0, (progress - warmup) / (1 - warmup))
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * along)))


def phase_at(progress: float, phases: Sequence[Phase]) -> Phase:
    bound = 0.0
    for phase in phases:
        bound += phase.share
        if progress < bound:
            return phase
    return phases[-1]


class Run:
    """Student, its moving average, optimizer, and what they learn from."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.teacher = Teacher(args.teacher, args.teacher_name, args.layer)
        model = self.teacher.backbone.model
        vit, self.model_args = build_student(args.depth, args.mlp_ratio, args.img_size)
        self.student = Student(vit)
        self.average = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.objective = Objective(model.embed_dim, args.alike)
        parameters = list(self.student.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim == 2], "weight_decay": args.weight_decay},
            {"params": [p for p in parameters if p.ndim != 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
        self.source = Source(args.images, args.held_out, args.seed)
        self.phase: Phase | None = None
        self.step, self.crops, self.elapsed = 0, 0, 0.0
        self.checkpoint = args.output / "checkpoint.pt"
        if self.checkpoint.exists():
            self._restore()
        else:
            self._start()
        size = (args.held_out_size, args.held_out_size)
        self.held_out = torch.stack(
            [torch.from_numpy(middle(path, *size)) for path in self.source.held_out]
        )
        self.held_out_features = self.teacher(self.held_out)

    @torch.no_grad()
    def _start(self) -> None:
        """Student, its linear layer and the standardisation from some crops."""
        phase = self.args.phases[0]
        crops, wanted = self._fresh(phase.height, phase.width, self.args.calibrate)
        images = self.teacher.normalise(crops)
        missed = narrow(self.student.vit, self.teacher.backbone.model, images)
        print("variance missed by the start, block by block:", missed, flush=True)
        self.objective.fit(wanted)
        found = torch.cat([self.student(part) for part in images.split(8)]).flatten(0, 1)
        weight, bias = ridge(found, self.objective.standardise(wanted).flatten(0, 1), 0.02)
        self.student.head.weight.copy_(weight)
        self.student.head.bias.copy_(bias)
        self.average.load_state_dict(self.student.state_dict())

    @property
    def progress(self) -> float:
        """Part of the run that is done."""
        steps = self.args.steps
        return self.step / steps if steps else self.elapsed / (60 * self.args.minutes)

    def _fresh(self, height: int, width: int, n: int) -> tuple[Tensor, Tensor]:
        crops = np.stack([self.source.draw(height, width) for _ in range(n)])
        self.crops += n
        return (crops := torch.from_numpy(crops)), self.teacher(crops)

    def advance(self, progress: float) -> dict[str, float]:
        """One step; the losses."""
        phase = phase_at(progress, self.args.phases)
        if phase is not self.phase:
            self.phase, self.pool = phase, Pool(self.args.capacity, self.args.reuse)
            self.pool.add(*self._fresh(phase.height, phase.width, 4 * phase.batch))
        if self.pool.hungry:
            self.pool.add(*self._fresh(phase.height, phase.width, phase.batch))
        for group in self.optimizer.param_groups:
            group["lr"] = rate(progress, self.args.lr)
        crops, wanted = self.pool.draw(phase.batch)
        terms = self.objective(self.student, self.teacher.normalise(crops), wanted)
        self.optimizer.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), self.args.clip)
        self.optimizer.step()
        self.step += 1
        keep = min(self.args.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.student.parameters()), 1 - keep
            )
        return {name: value.item() for name, value in terms.items()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Losses of the averaged student on the held-out images."""
        images = self.teacher.normalise(self.held_out)
        each = [
            self.objective(self.average, image[None], wanted[None])
            for image, wanted in zip(images, self.held_out_features, strict=True)
        ]
        terms = {name: sum(t[name] for t in each) / len(each) for name in each[0]}
        return {name: round(value.item(), 4) for name, value in terms.items()}

    def save(self) -> None:
        parts = {name: getattr(self, name).state_dict() for name in PARTS}
        counts = {name: getattr(self, name) for name in COUNTS}
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(parts | counts | {"model_args": self.model_args}, partial)
        partial.replace(self.checkpoint)

    def _restore(self) -> None:
        saved = torch.load(self.checkpoint, weights_only=True)
        for name in PARTS:
            getattr(self, name).load_state_dict(saved[name])
        for name in COUNTS:
            setattr(self, name, saved[name])
        # Neither the draws of the first start again nor those that would have followed.
        self.source.random.seed(f"{self.args.seed}/{self.step}")
        print(f"continuing at step {self.step}, {self.elapsed:.0f} s", flush=True)


PARTS = ("student", "average", "objective", "optimizer")
COUNTS = ("step", "crops", "elapsed")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--teacher", type=Path, required=True, help="weights of the teacher")
    add("--teacher-name", default="dinov2-s", help="name of the teacher, as of fmupsample")
    add("--layer", type=int, default=9, help="layer whose features are learned")
    add("--images", type=Folder.parse, nargs="+", required=True, help="folders: PATH[:WEIGHT]")
    add("--depth", type=int, default=6, help="blocks of the student")
    add("--mlp-ratio", type=float, default=0.75, help="hidden neurons of its MLPs, in widths")
    add("--img-size", type=int, default=518, help="sets its grid of positions")
    add("--minutes", type=float, help="length of the run by the clock")
    add("--steps", type=int, help="or by steps")
    add("--phases", type=Phase.parse, nargs="+", default=[Phase.parse(p) for p in PHASES],
        help="SHARE:HEIGHTxWIDTH:BATCH")  # fmt: skip
    add("--reuse", type=float, default=4.0, help="how often a crop is used")
    add("--capacity", type=int, default=1000, help="crops in memory")
    add("--calibrate", type=int, default=160, help="crops to start from")
    add("--alike", type=float, default=4.0, help="weight of the similarities of patches")
    add("--lr", type=float, default=2e-4)
    add("--weight-decay", type=float, default=0.02)
    add("--clip", type=float, default=1.0)
    add("--average", type=float, default=0.998, help="decay of the moving average")
    add("--held-out", type=int, default=64, help="images to measure on")
    add("--held-out-size", type=int, default=280)
    add("--save-every", type=float, default=120, help="seconds between checkpoints")
    add("--measure-every", type=float, default=600, help="seconds between held-out losses")
    add("--threads", type=int, default=1)
    add("--seed", type=int, default=0)
    add("-o", "--output", type=Path, required=True)
    args = parser.parse_args(argv)
    if bool(args.minutes) == bool(args.steps):
        parser.error("give either --minutes or --steps")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    run = Run(args)
    log = (args.output / "log.jsonl").open("a")

    def report(row: dict[str, float]) -> None:
        row = {"step": run.step, "minutes": round(run.elapsed / 60, 2), "crops": run.crops} | row
        print(json.dumps(row), flush=True)
        log.write(json.dumps(row) + "\n")
        log.flush()

    recent: list[dict[str, float]] = []
    saved = last = time.monotonic()
    measured = run.elapsed if run.step else -math.inf
    while (progress := run.progress) < 1:
        if run.elapsed - measured >= args.measure_every:
            report({f"held_out_{k}": v for k, v in run.evaluate().items()})
            measured = run.elapsed
        recent.append(run.advance(progress))
        if not all(map(math.isfinite, recent[-1].values())):
            raise FloatingPointError(f"the loss is not finite at step {run.step}")
        if len(recent) == 50:
            report({k: round(sum(r[k] for r in recent) / 50, 4) for k in recent[0]})
            recent.clear()
        now = time.monotonic()
        run.elapsed, last = run.elapsed + now - last, now
        if now - saved > args.save_every:
            run.save()
            saved = now
    run.save()
    report({f"held_out_{k}": v for k, v in run.evaluate().items()})


if __name__ == "__main__":
    main()
