"""The family trained alike: every method for as many steps, on the same crops, and then compared.

    python research/benchmarks/equal_steps.py --photos DIR --camvid DIR -o FOLDER

Each head is trained by the library's own training (`fmupsample train`, default objective, no choice
of a best step), then judged by linear probes on CamVid, with pixels of the upsampled maps drawn
once and the same for all (:mod:`fmupsample.probing.sampled`), since stacks are not linear in their
values. Written are the heads, ``equal_steps.json``, a table ``equal_steps.md``, and the PCA of one
picture by each method, ``equal_steps.jpg``. A run that was stopped goes on where it was when it is
given the same folder. What so few steps make of a method is how soon it learns, not how far it can
get.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

import tables
from cells import Cells
from common import options, parse_options, tell_faults, write_text
from fmupsample.backbones import Backbone, load_backbone
from fmupsample.device import resolve_device
from fmupsample.draw.panel import Tile, draw_panel
from fmupsample.draw.pca import PCABasis, sample_tokens
from fmupsample.errors import FmupsampleError
from fmupsample.images.find import find_images
from fmupsample.images.size import ImageSize
from fmupsample.pipeline import Item, Pipeline
from fmupsample.probing.sampled import Comparison
from fmupsample.progress import Progress
from fmupsample.training.config import TrainConfig
from fmupsample.training.run import train
from fmupsample.upsamplers import Upsampler, load_upsampler
from fmupsample.upsamplers.heads import load_head, read_head_metadata
from fmupsample_cli.progress import RichProgress, note
from labelled import CAMVID, camvid

# What is trained, the quick ones first: where time runs out, these are there.
TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "bilateral-cells": ("bilateral-cells", {}),
    "resfu": ("resfu", {}),
    "sapa-b": ("sapa", {"similarity": "bilinear"}),
    "sapa-g": ("sapa", {"similarity": "gated"}),
    "lda-aqu": ("lda-aqu", {}),
    "dysample": ("dysample", {}),
    "carafe": ("carafe", {}),
    "featup": ("featup", {}),
}
UNTRAINED = ("nearest", "bilinear", "jbu")
EXAMPLE = Path(__file__).parents[2] / "examples" / "images" / "cat.jpg"
NAME = "equal_steps"
KEYS = ("dataset", "upsampler", "fingerprint", "seed")  # of a cell
Say = Callable[[str], None]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = options(__doc__, "folder for heads and results", required=True)
    add = parser.add_argument
    add("--photos", type=Path, required=True, help="folder of pictures to train on")
    add("--camvid", type=Path, required=True, help="folder with train/ and val/")
    add("--methods", nargs="*", choices=list(TRAINED), default=list(TRAINED))
    add("--steps", type=int, default=150, help="of each method (150)")
    add("--batch-size", type=int, default=1, help="crops a step (1)")
    add("--image-size", type=int, default=168, help="side of the crops (168)")
    add("--pictures", type=int, default=400, help="photographs used, at most (400)")
    add("--probe-size", type=int, default=168, help="short side of CamVid's pictures (168)")
    add("--limits", type=int, nargs=2, default=[60, 30], help="of CamVid train and val (60 30)")
    add("--picture", type=Path, default=EXAMPLE, help="what is drawn by every method")
    add("--picture-size", type=int, default=224, help="its short side (224)")
    add("--backbone", default="embedded")
    add("--seed", type=int, default=0)
    add("--device", default="auto")
    return parse_options(parser, arguments)


def settings(args: argparse.Namespace, backbone: Backbone, pictures: int) -> dict[str, Any]:
    """Everything that decides the numbers and is the same for all methods."""
    return {
        "backbone": backbone.name,
        "backbone_fingerprint": backbone.fingerprint,
        "layer": backbone.layer,
        "pictures": pictures,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "image_size": args.image_size,
        "probe_size": args.probe_size,
        "camvid_limits": args.limits,
        "seed": args.seed,
    }


def trained(
    name: str, args: argparse.Namespace, backbone: Backbone, progress: Progress, say: Say
) -> Upsampler:
    """The head of this name: found in the folder, or trained, going on where a run was stopped."""
    path = args.output / "heads" / f"{name}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        method, options = TRAINED[name]
        config = TrainConfig(
            upsampler=method,
            upsampler_config=options,
            image_sizes=(args.image_size,),
            steps=args.steps,
            batch_size=args.batch_size,
            seed=args.seed,
            held_out=0,  # every method keeps its last weights: nothing is chosen
            previews=0,
        )
        report = train(
            backbone,
            find_images([args.photos])[: args.pictures],
            path,
            config,
            device=args.device,
            resume=True,
            progress=progress,
        )
        say(
            f"{name}: {report.parameters} parameters, {report.seconds:.0f} s for {args.steps} steps"
        )
    return load_head(path, backbone)


def facts(name: str, upsampler: Upsampler, args: argparse.Namespace) -> dict[str, Any]:
    """What identifies a contender, for the JSON."""
    found = {
        "method": upsampler.name,
        "fingerprint": upsampler.fingerprint,
        "parameters": sum(p.numel() for p in upsampler.parameters()),
    }
    if name in TRAINED:
        metadata = read_head_metadata(args.output / "heads" / f"{name}.safetensors")
        found["config"] = metadata["config"]
        found["seconds"] = metadata["card"].get("seconds")
    return found


def comparison(args: argparse.Namespace, backbone: Backbone, progress: Progress) -> Comparison:
    train_pairs, val_pairs = (
        camvid(args.camvid, split, limit)
        for split, limit in zip(("train", "val"), args.limits, strict=True)
    )
    size = ImageSize(short=args.probe_size)
    pipeline = Pipeline(backbone, image_size=size, device=resolve_device(args.device))
    return Comparison(pipeline, train_pairs, val_pairs, CAMVID, seed=args.seed, progress=progress)


def side_by_side(
    args: argparse.Namespace, backbone: Backbone, upsamplers: dict[str, Upsampler]
) -> np.ndarray:
    """One picture's features in the same colours by every upsampler, uint8 ``[H, W, 3]``."""
    size, device = ImageSize(short=args.picture_size), resolve_device(args.device)
    tiles: list[Tile] = []
    basis: PCABasis | None = None
    for name, upsampler in upsamplers.items():
        pipeline = Pipeline(backbone, upsampler, image_size=size, device=device)
        item = next(pipeline.items(find_images([args.picture]), on_error=_stop))
        if basis is None:
            basis = PCABasis.fit(sample_tokens(item.features, 4096))
            tiles.append(Tile("picture", item.canvas))
        label = "patch features" if name == "nearest" else name
        tiles.append(Tile(label, basis.to_rgb(_scores(pipeline, item, basis))))
    steps = f"{args.steps} steps of {args.batch_size}, {args.image_size} px"
    caption = f"{backbone.name}, heads after {steps}"
    return draw_panel(tiles, caption=caption, columns=min(4, len(tiles))).pixels


def _scores(pipeline: Pipeline, item: Item, basis: PCABasis) -> torch.Tensor:
    assert pipeline.upsampler is not None
    if pipeline.upsampler.linear_in_value:
        return pipeline.upsample(item, value=basis.apply(item.features))
    return basis.apply(pipeline.upsample(item))


def _stop(source: object, error: FmupsampleError) -> None:
    raise error


def run(args: argparse.Namespace, progress: Progress, say: Say) -> Cells:
    """Train and judge one method after the other; what is finished is in the folder."""
    backbone = load_backbone(args.backbone)
    pictures = len(find_images([args.photos])[: args.pictures])
    device = resolve_device(args.device)
    path = args.output / f"{NAME}.json"
    cells = Cells(path, device, settings(args, backbone, pictures))
    cells.write()  # from now on the folder belongs to these settings
    backbone = backbone.to(device)
    compared: Comparison | None = None
    upsamplers: dict[str, Upsampler] = {}
    for name in (*UNTRAINED, *args.methods):
        try:
            if name in TRAINED:
                upsampler = trained(name, args, backbone, progress, say)
            else:
                upsampler = load_upsampler(backbone, name)
        except FmupsampleError as error:
            cells.skipped[name] = str(error)
            say(f"{name}: left out, {error}")
            continue
        upsamplers[name] = upsampler
        key = ("camvid", name, upsampler.fingerprint, args.seed)
        if cells.find(*key) is not None:
            say(f"{name}: judged before")
            continue
        compared = compared or comparison(args, backbone, progress)
        begun = time.perf_counter()
        cell = dict(zip(KEYS, key, strict=True)) | compared.measure(upsampler)
        cells.add(cell, facts(name, upsampler, args))
        write_text(args.output / f"{NAME}.md", tables.markdown(cells.cells, list(upsamplers)))
        said = ", ".join(f"{p} {100 * cell[p]['miou']:.1f}" for p in tables.PROBES)
        say(f"{name}: {said} ({time.perf_counter() - begun:.0f} s)")
    cells.write()
    picture = Image.fromarray(side_by_side(args, backbone, upsamplers))
    picture.save(args.output / f"{NAME}.jpg", quality=92)
    return cells


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    with RichProgress(unit="steps") as progress:
        cells = run(args, progress, note)
    names = [name for name in (*UNTRAINED, *TRAINED) if name in cells.upsamplers]
    console = Console()
    console.width = max(console.width, 100)
    console.print(tables.table(cells.cells, "camvid", names))


if __name__ == "__main__":
    tell_faults(main)
