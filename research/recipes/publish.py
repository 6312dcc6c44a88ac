"""Turn a run of distil.py into the shipped file: weights with their card in the header, checked.

    python research/recipes/publish.py --run run/ --card card.json -o weights/embedded.safetensors

The card (teacher, data, command, metrics, limits) is a JSON object written by hand after measuring;
steps, crops and seconds are added from the run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import timm
import torch

from backbone import save_embedded
from distil import patches
from fmupsample.backbones.embedded import load_backbone_file
from prune import ARCHITECTURE

TAG = "embedded.v2"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--run", type=Path, required=True, help="--output of distil.py")
    add("--card", type=Path, required=True)
    add("--tag", default=TAG)
    add("--image-size", type=int, default=448, help="short side in pixels that suits it")
    add("-o", "--output", type=Path, required=True)
    args = parser.parse_args(argv)

    saved = torch.load(args.run / "checkpoint.pt", weights_only=True)
    student = timm.create_model(ARCHITECTURE, **saved["model_args"])
    prefix = "vit."
    state = {k.removeprefix(prefix): v for k, v in saved["average"].items() if k.startswith(prefix)}
    student.load_state_dict(state)
    card = json.loads(args.card.read_text()) | {
        "steps": saved["step"], "crops": saved["crops"], "seconds": round(saved["elapsed"])
    }  # fmt: skip
    shape = (ARCHITECTURE, saved["model_args"], args.tag, args.image_size)
    save_embedded(args.output, student, *shape, card)

    images = torch.randn(2, 3, 448, 672, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        published = load_backbone_file(args.output)[0].eval()
        before, after = (patches(model, images) for model in (student.eval(), published))
    change = ((after - before).norm() / before.norm()).item()
    parameters = sum(p.numel() for p in student.parameters())
    print(
        f"{args.output}: {args.output.stat().st_size / 1e6:.2f} MB, {parameters / 1e6:.2f}M "
        f"parameters; fp16 storage changes the features by {change:.1e}"
    )


if __name__ == "__main__":
    main()
