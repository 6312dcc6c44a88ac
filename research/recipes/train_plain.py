"""Train a small network on one plain objective: labels, masked pixels, or telling pictures apart.

    python research/recipes/train_plain.py --objective label --architecture resnet10t \
        --labelled imagenette224/ --minutes 12 -o run-conv/
    python research/recipes/train_plain.py --objective mask --architecture vit_small_patch8_224 \
        --model-args '{"depth": 4, "dynamic_img_size": true}' --images photos/ \
        --minutes 12 -o run-mim/

- label: cross-entropy of the network's own classifier, for any architecture of timm.
- mask: a masked autoencoder (He et al. 2022) for a timm ViT: the network sees a part of the patches
  only, which also makes it cheap, and a one-block decoder predicts the pixels of the others.
- contrast: of two crops of every picture, each seen in part, the mean patch token of one tells
  which of the batch is the other (SimCLR, Chen et al. 2020), for a timm ViT.

train_backbone.py trains better features; these exist because features for a universal head
should differ in where they come from. A run continues from its checkpoint if started again with the
same --output. With --minutes the schedules follow the clock.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import nn

from augment import make_view
from backbone import (
    MEAN,
    STD,
    make_backbone,
    patch_size,
    prefer_plain_attention,
    save_embedded,
    wave_positions,
    whiten_patch_embed,
)  # fmt: skip
from pictures import load_pictures
from train_backbone import parse_run, phase_at, run_parser, save_checkpoint, schedule

PHASES = ("0.75:96:48:0.25", "0.25:192:12:0.4")


class Classified(nn.Module):
    """A network with its classifier."""

    views = 1

    def __init__(self, architecture: str, model_args: dict, classes: int) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"--objective label needs 2 classes or more, not {classes}")
        # Without a layout that convolutions like, bfloat16 on CPUs is no faster than float32.
        self.net = timm.create_model(architecture, **model_args | {"num_classes": classes}).to(
            memory_format=torch.channels_last
        )

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy, smoothed. ``images`` [B, 3, S, S], normalised; ``labels`` [B]."""
        logits = self.net(images.contiguous(memory_format=torch.channels_last))
        return F.cross_entropy(logits.float(), labels, label_smoothing=0.1)

    @torch.no_grad()
    def score(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Share of ``images`` whose class is found."""
        was_training = self.net.training
        parts = zip(images.split(50), labels.split(50), strict=True)
        hits = [self.net.eval()(i).argmax(1) == c for i, c in parts]
        self.net.train(was_training)
        return torch.cat(hits).float().mean().item()


def encode_some(
    vit: nn.Module, images: torch.Tensor, hidden: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The patches of ``images`` [B, 3, S, S] that are not hidden, as the ViT alone with them makes
    them: tokens [B, V, C] after the final norm, and the positions [B, V] that were seen and
    [B, h * w - V] that were not.

    Args:
        hidden: smallest and largest share of hidden patches, drawn for each batch.
    """
    prefix = vit.num_prefix_tokens
    patches = vit.patch_embed(images)  # [B, h, w, C] because of dynamic_img_size
    b, h, w, channels = patches.shape
    tokens = vit.norm_pre(vit._pos_embed(patches))
    share = hidden[0] + (hidden[1] - hidden[0]) * torch.rand(()).item()
    visible = max(1, round((1 - share) * h * w))
    order = torch.rand(b, h * w, device=images.device).argsort(1)
    seen, unseen = order[:, :visible], order[:, visible:]
    kept = tokens[:, prefix:].gather(1, seen[..., None].expand(-1, -1, channels))
    x = torch.cat([tokens[:, :prefix], kept], 1)
    for block in vit.blocks:
        x = block(x)
    return vit.norm(x)[:, prefix:], seen, unseen


class Masked(nn.Module):
    """A ViT that sees some patches, and a small decoder that draws the others.

    Args:
        hidden: share of hidden patches. Less at times than the 75 % of the paper, so that whole
            pictures are not too far from what was seen.
        width: channels of the decoder.
    """

    views = 1

    def __init__(
        self, vit: nn.Module, hidden: tuple[float, float] = (0.5, 0.8), width: int = 128
    ) -> None:
        super().__init__()
        self.net, self.hidden, self.patch = vit, hidden, patch_size(vit)
        self.bridge = nn.Linear(vit.embed_dim, width)
        self.place = nn.Linear(vit.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.decoder = Block(width, num_heads=width // 32)
        self.pixels = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 3 * self.patch * self.patch)
        )

    def wanted(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels of every patch, [B, h * w, 3 * p * p], of mean 0 and deviation 1 per patch (He et
        al.'s better target: contrast, not brightness)."""
        pixels = F.pixel_unshuffle(images, self.patch).flatten(2).transpose(1, 2)
        return F.layer_norm(pixels, pixels.shape[-1:], eps=1e-2)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean squared error on the hidden patches of ``images`` [B, 3, S, S], normalised."""
        tokens, seen, unseen = encode_some(self.net, images, self.hidden)
        x = self.bridge(tokens)
        # The encoder's own position embedding tells the decoder what belongs where.
        h, w = images.shape[2] // self.patch, images.shape[3] // self.patch
        nothing = x.new_zeros(1, h, w, tokens.shape[-1])
        places = self.place(self.net._pos_embed(nothing)[:, self.net.num_prefix_tokens :])
        full = self.mask_token.to(x.dtype).expand(len(x), h * w, -1)
        full = full.scatter(1, seen[..., None].expand(-1, -1, x.shape[-1]), x)
        drawn = self.pixels(self.decoder(full + places)).float()
        error = (drawn - self.wanted(images)).square().mean(-1)
        return error.gather(1, unseen).mean()


class Contrasted(nn.Module):
    """A ViT whose mean patch token finds the other crop of the same picture."""

    views = 2

    def __init__(
        self,
        vit: nn.Module,
        hidden: tuple[float, float] = (0.5, 0.8),
        width: int = 128,
        temperature: float = 0.2,
    ) -> None:
        super().__init__()
        self.net, self.hidden, self.patch, self.temperature = (
            vit,
            hidden,
            patch_size(vit),
            temperature,
        )
        self.project = nn.Sequential(
            nn.Linear(vit.embed_dim, 256), nn.GELU(), nn.Linear(256, width)
        )

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of finding the partner in the batch. ``images`` [2B, 3, S, S], normalised:
        the first crops of all pictures, then the second ones."""
        tokens, _, _ = encode_some(self.net, images, self.hidden)
        unit = F.normalize(self.project(tokens.mean(1)).float(), dim=-1)
        itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
        similarity = (unit @ unit.T / self.temperature).masked_fill(itself, -1e4)
        partner = torch.arange(len(unit), device=unit.device).roll(len(unit) // 2)
        return F.cross_entropy(similarity, partner)


VITS = {"mask": Masked, "contrast": Contrasted}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = run_parser(__doc__, PHASES)
    add = parser.add_argument
    add("--objective", choices=["label", *VITS], required=True)
    add("--architecture", required=True)
    add("--model-args", type=json.loads, default={}, help="JSON of timm.create_model arguments")
    add("--lr", type=float, default=2e-3)
    add("--strength", type=float, default=0.6, help="of the photometric changes")
    add("--held-out", type=int, default=500, help="labelled pictures kept aside to be scored")
    add("--save-every", type=float, default=60, help="seconds between checkpoints")
    add("--tag", default="plain")
    return parse_run(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    prefer_plain_attention(device)
    args.output.mkdir(parents=True, exist_ok=True)
    pictures = load_pictures(args.images, args.labelled, args.side, args.cache)
    squares, labels = pictures.squares, pictures.labels
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (MEAN, STD))

    def normalised(pick: torch.Tensor) -> torch.Tensor:
        return (squares[pick].to(device).float() / 255 - mean) / std

    odds, held_out = torch.ones(len(squares)), torch.empty(0, dtype=torch.long)
    if args.objective == "label":
        known = (labels >= 0).nonzero()[:, 0]
        held_out = known[torch.randperm(len(known))[: args.held_out]].sort()[0]
        odds = (labels >= 0).float()
        odds[held_out] = 0
        learner = Classified(args.architecture, args.model_args, len(pictures.class_names))
    else:
        vit = make_backbone(args.architecture, args.model_args | {"num_classes": 0})
        wave_positions(vit)
        side = args.side // patch_size(vit) * patch_size(vit)
        sample = torch.randperm(len(squares))[:256].sort()[0]
        whiten_patch_embed(vit, normalised(sample)[:, :, :side, :side].cpu())
        learner = VITS[args.objective](vit)
    learner = learner.to(device).train()
    cell = learner.patch if args.objective in VITS else 32
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in learner.parameters() if p.ndim > 1]},
            {"params": [p for p in learner.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=args.lr,
        weight_decay=args.weight_decay,
        betas=(0.9, 0.98),
        fused=True,
    )

    step, elapsed, seen, results = 0, 0.0, 0, {}
    checkpoint = args.output / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        learner.load_state_dict(saved["learner"])
        optimizer.load_state_dict(saved["optimizer"])
        step, elapsed, seen = saved["step"], saved["elapsed"], saved["views"]
        torch.manual_seed(args.seed + step)  # neither the old stream nor the same draws again
        print(f"continuing at step {step}, {elapsed:.0f} s", flush=True)

    def store() -> None:
        content = {"learner": learner.state_dict(), "optimizer": optimizer.state_dict()}
        save_checkpoint(checkpoint, content | {"step": step, "elapsed": elapsed, "views": seen})
        card = {"seed": args.seed, "steps": step, "seconds": round(elapsed), "views": seen}
        shape = (args.architecture, args.model_args | {"num_classes": 0}, args.tag, 336)
        bare = timm.create_model(args.architecture, **shape[1])  # without classifier
        bare.load_state_dict({k: learner.net.state_dict()[k] for k in bare.state_dict()})
        save_embedded(args.output / "backbone.safetensors", bare, *shape, card | results)

    log = (args.output / "log.jsonl").open("a")
    last_save, last_time, recent = time.time(), time.time(), []
    while True:
        progress = step / args.steps if args.steps else elapsed / (60 * args.minutes)
        if progress >= 1:
            break
        phase = phase_at(progress, args.phases)
        size = max(2, round(phase.size / cell)) * cell
        lr = schedule(progress, 0.05, 0.5, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        pick = torch.multinomial(odds, phase.batch).sort()[0]
        batch = squares[pick].to(device).float() / 255
        area = (phase.area, 1.0)
        views = [make_view(batch, size, area, args.strength) for _ in range(learner.views)]
        images = torch.cat([view.images for view in views])
        with torch.autocast(device.type, torch.bfloat16):
            loss = learner((images - mean) / std, labels[pick].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()

        step += 1
        seen += len(images)
        recent.append(loss.item())
        if step % 50 == 0 or step == 5:
            results["loss"] = round(sum(recent) / len(recent), 4)
            recent.clear()
            if not math.isfinite(results["loss"]):
                raise FloatingPointError(f"the loss is not finite at step {step}")
            row = {"step": step, "progress": round(progress, 3), "size": size, "lr": round(lr, 6)}
            row |= results | {"views_per_s": round(seen / max(1e-6, elapsed))}
            print(json.dumps(row), flush=True)
            log.write(json.dumps(row) + "\n")
            log.flush()
        now = time.time()
        elapsed, last_time = elapsed + now - last_time, now
        if now - last_save > args.save_every:
            store()
            last_save = now
    if len(held_out):
        score = learner.score(normalised(held_out), labels[held_out].to(device))
        results["held_out_accuracy"] = round(score, 4)
    store()
    print(f"done: {step} steps, {seen} views, {elapsed:.0f} s, {json.dumps(results)}", flush=True)


if __name__ == "__main__":
    main()
