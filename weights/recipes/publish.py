"""Turn a finished run into the shipped file: weights with their card in the header, checked once.

    python weights/recipes/publish.py --run run/ --card card.json -o weights/embedded.safetensors

The card (data, command, hardware, metrics, limits) is a JSON object written by hand after probing;
steps, views, seconds and seed are added from the run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import timm
import torch
from safetensors import safe_open

from backbone import load_embedded, save_embedded


def rounding_error(full: Path, published: Path, size: int = 448) -> float:
    """Relative change of the final features caused by fp16 storage: |new - old| / |old|."""
    state = torch.load(full, map_location="cpu", weights_only=True)["teacher"]
    new, _ = load_embedded(published)
    old, _ = load_embedded(published)
    old.load_state_dict({k.removeprefix("vit."): v for k, v in state.items() if k[:4] == "vit."})
    images = torch.randn(2, 3, size, size + 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        a, b = old.eval().forward_features(images), new.eval().forward_features(images)
    return ((b - a).norm() / a.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="--output of train_backbone.py")
    parser.add_argument("--card", type=Path, required=True)
    parser.add_argument("--image-size", type=int, default=448)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()

    model, metadata = load_embedded(args.run / "backbone.safetensors")
    card = json.loads(args.card.read_text()) | json.loads(metadata["card"])
    model_args = json.loads(metadata["model_args"])
    shape = (metadata["architecture"], model_args, metadata["tag"], args.image_size)
    save_embedded(args.output, model, *shape, card)

    # What a stranger would do with the file: timm alone, strict loading.
    with safe_open(str(args.output), "pt") as file:
        header = file.metadata()
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    twin = timm.create_model(header["architecture"], **json.loads(header["model_args"]))
    twin.load_state_dict(state, strict=True)
    parameters = sum(p.numel() for p in twin.parameters())
    error = rounding_error(args.run / "checkpoint.pt", args.output)
    print(
        f"{args.output}: {args.output.stat().st_size / 1e6:.2f} MB, {parameters / 1e6:.2f}M "
        f"parameters, fp16 storage changes features by {error:.1e}"
    )


if __name__ == "__main__":
    main()
