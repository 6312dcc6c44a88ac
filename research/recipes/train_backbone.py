"""Train a small ViT for dense patch features from nothing, without a teacher.

    python research/recipes/train_backbone.py --images photos/ bsds500/ --labelled imagenette224/ \
        --minutes 18 -o run/

train_source.py uses it. The embedded backbone comes from distil.py.

A student ViT sees two views of every picture, with holes in some of them; its losses (papers in
objective.py and targets.py):

- regress: every patch predicts local descriptors of the clean picture at its place. Useful from the
  first step.
- within: a hidden patch predicts the prototype the EMA teacher gives it unhidden (iBOT, Sinkhorn).
- across: a patch predicts the prototype of the same place in the other view.
- whole: the class token predicts the class token of the other view (DINO).
- label: cross-entropy on the mean *patch* token of labelled pictures, so that the patches
  themselves learn to tell object from ground.

The three that need the teacher enter in the second half: before that its guesses are noise, and
their cost buys more views. The exported weights are the teacher's. A run continues from its
checkpoint if started again with the same --output. With --minutes the schedules follow the clock.
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

import torch
import torch.nn.functional as F
from torch import nn

from augment import View, block_masks, make_view
from backbone import (
    DEFAULT_ARGS,
    MEAN,
    STD,
    make_backbone,
    mimetic_init,
    patch_size,
    prefer_plain_attention,
    save_embedded,
    wave_positions,
    whiten_patch_embed,
)  # fmt: skip
from objective import Learner, dense_agreement, global_agreement, move_average
from pictures import load_pictures
from targets import DenseTargets

# Small crops are cheap and carry most of the learning; large ones at the end teach large grids.
PHASES = ("0.7:84:32:0.15", "0.2:168:10:0.3", "0.1:336:3:0.4")
ARCHITECTURE = "eva02_tiny_patch14_224"
# Half of the depth: with minutes to train in, twice the views beat six more blocks.
# use_fc_norm: timm's EVA-02 otherwise norms after the pooling only, not the patches.
MODEL_ARGS = DEFAULT_ARGS | {"depth": 6, "use_fc_norm": False}


@dataclass
class Phase:
    """One part of the run at one picture size."""

    share: float  # of the run
    size: int  # pixels of a view; rounded to the patch size
    batch: int  # pictures per step (two views each)
    area: float  # smallest crop area; grows with the size, so that late phases see objects large

    @staticmethod
    def parse(text: str) -> Phase:
        share, size, batch, area = text.split(":")
        return Phase(float(share), int(size), int(batch), float(area))


def phase_at(progress: float, phases: Sequence[Phase]) -> Phase:
    """The phase at this part of the run, 0..1; the last one also where the shares fall short."""
    bound = 0.0
    for phase in phases:
        bound += phase.share
        if progress < bound:
            return phase
    return phases[-1]


def schedule(progress: float, warmup: float, decay: float, peak: float) -> float:
    """Trapezoid: linear warm-up, flat, linear to 1 % over the last `decay` of the run.

    Unlike a cosine, its flat part gives checkpoints worth having long before the end.
    """
    down = 1 - 0.99 * ramp(progress, 1 - decay, 1.0)
    return peak * min(max(progress, 1e-3) / warmup, down)


def ramp(progress: float, start: float, stop: float) -> float:
    return min(1.0, max(0.0, (progress - start) / (stop - start)))


def losses(
    student: Learner,
    teacher: Learner | None,  # None: its guesses are not worth their cost yet
    targets: DenseTargets,
    views: tuple[View, View],
    labels: torch.Tensor,  # [B] class or -1
    grid: int,
    smoothing: float,
) -> dict[str, torch.Tensor]:
    """All terms of the objective for one batch; views of size grid * patch."""
    device = labels.device
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (MEAN, STD))
    clean, seen = torch.cat([v.clean for v in views]), torch.cat([v.images for v in views])
    mask = block_masks(len(seen), grid, grid, (0.1, 0.6), device)
    mask &= (torch.rand(len(seen), device=device) < 0.6)[:, None, None]  # the rest whole, as later
    out = student((seen - mean) / std, mask)
    predicted, wanted = student.regress(out["patches"]), targets(clean)
    terms = {"regress": targets.loss(predicted, wanted, 0.5 + 0.5 * mask.float())}
    if teacher is not None:
        with torch.no_grad():
            guess = teacher((clean - mean) / std)
        temperatures = (0.1, 0.05)
        terms["within"], terms["across"] = dense_agreement(
            out["patch_similarity"], guess["patch_similarity"], mask, views, temperatures
        )
        terms["whole"] = global_agreement(
            out["whole_similarity"], guess["whole_similarity"], temperatures
        )
    known = (labels >= 0).repeat(2)
    if known.any():
        logits = student.classify(out["patches"].float().mean((1, 2)))[known]
        terms["label"] = F.cross_entropy(logits, labels.repeat(2)[known], label_smoothing=smoothing)
    return terms


def save_checkpoint(path: Path, content: dict) -> None:
    """Write beside, then rename: a killed run leaves the old checkpoint or the new one, never half
    of one."""
    partial = path.with_name(path.name + ".partial")
    torch.save(content, partial)
    partial.replace(path)


def run_parser(description: str, phases: Sequence[str]) -> argparse.ArgumentParser:
    """With the options of every run: pictures, phases, length, and where it goes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=Path, nargs="*", default=[], help="folders of pictures without labels")
    add(
        "--labelled", type=Path, nargs="*", default=[], help="folders whose sub-folders are classes"
    )
    add("--side", type=int, default=224, help="stored side of the training squares")
    add("--cache", type=Path, help="folder for decoded pictures")
    add(
        "--phases",
        type=Phase.parse,
        nargs="+",
        default=[Phase.parse(p) for p in phases],
        help="share:size:batch:smallest crop area",
    )
    add("--minutes", type=float, help="length of the run by the clock")
    add("--steps", type=int, help="or by steps")
    add("--weight-decay", type=float, default=0.05)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("-o", "--output", type=Path, required=True)
    return parser


def parse_run(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with the length of the run given in one way."""
    args = parser.parse_args(argv)
    if bool(args.minutes) == bool(args.steps):
        parser.error("give either --minutes or --steps")
    return args


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = run_parser(__doc__, PHASES)
    add = parser.add_argument
    add(
        "--unlabelled-repeat",
        type=float,
        default=2.0,
        help="how much likelier an unlabelled square is drawn",
    )
    add("--architecture", default=ARCHITECTURE)
    add(
        "--model-args",
        type=json.loads,
        default=MODEL_ARGS,
        help="JSON of timm.create_model arguments",
    )
    add("--start", choices=["mimetic", "timm"], default="timm", help="attention weights")
    add(
        "--trust",
        type=float,
        nargs=2,
        default=(0.5, 0.7),
        metavar=("START", "STOP"),
        help="part of the run over which the EMA teacher's targets come in",
    )
    add("--lr", type=float, default=5e-4)
    add("--prototypes", type=int, default=512)
    add("--strength", type=float, default=0.8, help="of the photometric changes")
    add(
        "--weights",
        type=json.loads,
        default={},
        help="JSON of loss weights that differ from the defaults",
    )
    add("--save-every", type=float, default=120, help="seconds between checkpoints")
    add("--tag", default="plain")
    return parse_run(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    prefer_plain_attention(device)
    args.output.mkdir(parents=True, exist_ok=True)
    pictures = load_pictures(args.images, args.labelled, args.side, args.cache)
    squares = pictures.squares.to(
        device
    )  # 12,000 squares of 224 pixels are 1.9 GB: they may live on the GPU
    labels = pictures.labels.to(device)
    odds = torch.where(pictures.labels < 0, args.unlabelled_repeat, 1.0)
    print(f"{len(squares)} squares, {len(pictures.class_names)} classes", flush=True)

    vit = make_backbone(args.architecture, args.model_args)
    patch = patch_size(vit)
    if args.start == "mimetic":
        mimetic_init(vit)
    wave_positions(vit)
    sample = squares[torch.randperm(len(squares))[:256].sort()[0].to(device)].cpu().float() / 255
    normalise = (torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None])
    side = args.side // patch * patch
    whiten_patch_embed(vit, ((sample - normalise[0]) / normalise[1])[:, :, :side, :side])

    targets = DenseTargets(patch).to(device)
    targets.calibrate(
        make_view(
            squares[torch.randperm(len(squares))[:384].sort()[0].to(device)].float() / 255,
            128 // patch * patch,
            (0.2, 1.0),
            0.0,
        ).clean
    )
    student = Learner(vit, targets.dim, len(pictures.class_names), args.prototypes).to(device)
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    decayed = [p for p in student.parameters() if p.ndim > 1]
    plain = [p for p in student.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": args.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=args.lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    weight = {
        "regress": 10.0,
        "within": 0.15,
        "across": 0.15,
        "whole": 0.05,
        "label": 0.5,
    } | args.weights

    step, elapsed, views_done = 0, 0.0, 0
    checkpoint = args.output / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        student.load_state_dict(saved["student"])
        teacher.load_state_dict(saved["teacher"])
        targets.load_state_dict(saved["targets"])
        optimizer.load_state_dict(saved["optimizer"])
        step, elapsed, views_done = saved["step"], saved["elapsed"], saved["views"]
        torch.manual_seed(args.seed + step)  # neither the old stream nor the same draws again
        print(f"continuing at step {step}, {elapsed:.0f} s", flush=True)

    def store() -> None:
        content = {"student": student.state_dict(), "teacher": teacher.state_dict()}
        content |= {"targets": targets.state_dict(), "optimizer": optimizer.state_dict()}
        content |= {"step": step, "elapsed": elapsed, "views": views_done}
        save_checkpoint(checkpoint, content)
        card = {"seed": args.seed, "steps": step, "seconds": round(elapsed), "views": views_done}
        shape = (args.architecture, args.model_args, args.tag, 448)
        save_embedded(args.output / "backbone.safetensors", teacher.vit, *shape, card)

    log = (args.output / "log.jsonl").open("a")
    last_save, last_time, recent = time.time(), time.time(), {}
    while True:
        progress = step / args.steps if args.steps else elapsed / (60 * args.minutes)
        if progress >= 1:
            break
        phase = phase_at(progress, args.phases)
        grid = max(2, round(phase.size / patch))
        lr = schedule(progress, 0.05, 0.35, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr

        index = torch.multinomial(odds, phase.batch).sort()[0].to(device)
        batch = squares[index].float() / 255
        views = tuple(
            make_view(batch, grid * patch, (phase.area, 1.0), args.strength) for _ in range(2)
        )
        trust = ramp(progress, *args.trust)  # in the EMA teacher
        with torch.autocast(device.type, torch.bfloat16):
            terms = losses(
                student,
                teacher if trust else None,
                targets,
                views,
                labels[index],
                grid,
                smoothing=0.1,
            )
        factor = {"regress": 1.0, "within": trust, "across": trust, "whole": trust, "label": 1.0}
        total = sum(weight[name] * factor[name] * value for name, value in terms.items())
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        move_average(teacher, student, 0.97 + 0.027 * ramp(progress, 0.0, 0.9))

        step += 1
        views_done += 2 * phase.batch
        for name, value in terms.items():
            recent.setdefault(name, []).append(value.detach())
        if step % 50 == 0 or step == 5:
            means = {name: round(torch.stack(v).mean().item(), 4) for name, v in recent.items()}
            recent.clear()
            if not all(math.isfinite(v) for v in means.values()):
                raise FloatingPointError(f"a loss is not finite at step {step}: {means}")
            row = {
                "step": step,
                "progress": round(progress, 3),
                "size": grid * patch,
                "lr": round(lr, 6),
                **means,
            }
            row["views_per_s"] = round(views_done / max(1e-6, elapsed))
            print(json.dumps(row), flush=True)
            log.write(json.dumps(row) + "\n")
            log.flush()
        now = time.time()
        elapsed, last_time = elapsed + now - last_time, now
        if now - last_save > args.save_every:
            store()
            last_save = now
    store()
    print(f"done: {step} steps, {views_done} views, {elapsed:.0f} s", flush=True)


if __name__ == "__main__":
    main()
