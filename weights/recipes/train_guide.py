"""Train the convolutional guide of train_backbone.py: a ResNet-10-T on the labelled pictures, a few
epochs.

    python weights/recipes/train_guide.py --labelled imagenette224/ --epochs 5 -o run/guide.pt

A convolutional network learns from 9,000 pictures in minutes what a ViT needs hours for; the ViT
then learns its dense maps by regression (targets.py). The guide is not shipped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

from augment import make_view
from backbone import MEAN, STD
from pictures import load_pictures
from targets import GUIDE


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labelled", type=Path, nargs="+", required=True)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument(
        "--held-out", type=int, default=500, help="pictures kept aside to report accuracy"
    )
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    pictures = load_pictures([], args.labelled, args.side, args.cache)
    squares, labels = pictures.squares, pictures.labels
    order = torch.randperm(len(squares))
    held_out, train = order[: args.held_out], order[args.held_out :]
    net = timm.create_model(GUIDE, num_classes=len(pictures.class_names))
    net = net.to(args.device, memory_format=torch.channels_last)
    mean, std = (torch.tensor(v, device=args.device)[:, None, None] for v in (MEAN, STD))

    per_epoch = len(train) // args.batch
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, per_epoch * args.epochs, pct_start=0.2
    )
    start = time.time()
    for epoch in range(args.epochs):
        net.train()
        order, total = train[torch.randperm(len(train))], 0.0
        for i in range(per_epoch):
            pick = order[i * args.batch : (i + 1) * args.batch].sort()[0]
            images = make_view(
                squares[pick].to(args.device).float() / 255, args.size, (0.35, 1.0), 0.6
            ).images
            images = ((images - mean) / std).contiguous(memory_format=torch.channels_last)
            with torch.autocast(images.device.type, torch.bfloat16):
                logits = net(images)
            loss = F.cross_entropy(
                logits.float(), labels[pick].to(args.device), label_smoothing=0.1
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        net.eval()
        hits = []
        with torch.no_grad():
            for pick in held_out.sort()[0].split(100):
                logits = net((squares[pick].to(args.device).float() / 255 - mean) / std)
                hits.append(logits.argmax(1).cpu() == labels[pick])
        accuracy, seconds = torch.cat(hits).float().mean().item(), time.time() - start
        print(
            f"epoch {epoch + 1}: loss {total / per_epoch:.3f}, "
            f"held-out accuracy {accuracy:.3f}, {seconds:.0f} s",
            flush=True,
        )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    partial = args.output.with_name(args.output.name + ".partial")
    torch.save({name: value.cpu() for name, value in net.state_dict().items()}, partial)
    partial.replace(args.output)


if __name__ == "__main__":
    main()
