"""Train one of several small feature sources, so that a head can be taught and tested on features
that differ.

    python research/recipes/train_source.py sup-vit --images photos/ bsds500/ \
        --labelled imagenette224/ -o sources/

A head for every backbone must not know one family of features only. The sources differ in
objective, architecture, width, patch size and starting point; the table below has them all. Each
takes some ten minutes of one CPU core: they are features with a meaning, not good features. None is
shipped.

The result is ``sources/NAME.safetensors``, a backbone file, with the tensors under timm's own
names. It is used like any other local checkpoint; width and depth come from its header:

    fmupsample visualize PICTURE --backbone vit_tiny_patch16_224 \
        --backbone-weights sources/sup-vit.safetensors

A run that was killed continues from ``sources/runs/NAME`` if started again. Options that this
script does not know go to the recipe of the source (train_backbone.py or train_plain.py) and
override the table: ``--minutes 30``, ``--steps 5``, ``--device cuda``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

import train_backbone
import train_plain
from backbone import DEFAULT_ARGS


@dataclass(frozen=True)
class Source:
    """How one source is made."""

    objective: str  # in words, for the list
    architecture: str  # timm's name
    patch: int  # pixels per feature cell, at the layer used by default
    width: int  # channels there
    minutes: float  # of one CPU core
    options: tuple[str, ...]  # of the recipe
    model_args: dict  # of timm.create_model
    plain: bool = False  # train_plain.py instead of train_backbone.py
    labels: bool = False  # whether classes are used; else all pictures are just pictures

    def command(self, name: str, images: list[Path], labelled: list[Path], output: Path) -> list:
        """Arguments for the recipe."""
        known, unknown = (labelled, images) if self.labels else ([], [*labelled, *images])
        return [
            *("--architecture", self.architecture, "--model-args", json.dumps(self.model_args)),
            *("--labelled", *map(str, known), "--images", *map(str, unknown)),
            *("--tag", f"source-{name}", "--minutes", str(self.minutes)),
            *self.options,
            *("-o", str(output)),
        ]  # fmt: skip


# A teacher that is never trusted is never run: --trust 1 2.
SOURCES = {
    "sup-vit": Source(
        objective="labels of the mean patch token, and local descriptors at every patch",
        architecture="vit_tiny_patch16_224",
        model_args=DEFAULT_ARGS | {"depth": 6},
        patch=16,
        width=192,
        minutes=13,
        labels=True,
        options=(
            *("--weights", '{"regress": 2, "label": 1}', "--trust", "1", "2", "--lr", "8e-4"),
            *("--strength", "0.6", "--unlabelled-repeat", "1"),
            *("--phases", "0.75:96:32:0.25", "0.25:224:6:0.4"),
        ),
    ),
    "conv": Source(
        objective="labels",
        architecture="resnet10t",
        model_args={},
        patch=16,
        width=256,
        minutes=11,
        labels=True,
        plain=True,
        options=(
            *("--objective", "label", "--lr", "3e-3"),
            *("--phases", "0.7:64:64:0.3", "0.3:128:24:0.4"),
        ),
    ),
    "mim-vit": Source(
        objective="pixels of hidden patches (masked autoencoder)",
        architecture="vit_small_patch8_224",
        model_args=DEFAULT_ARGS | {"depth": 4},
        patch=8,
        width=384,
        minutes=11,
        plain=True,
        options=(
            *("--objective", "mask", "--lr", "1e-3", "--strength", "0.3"),
            *("--phases", "0.8:96:32:0.2", "0.2:224:6:0.4"),
        ),
    ),
    "dino-vit": Source(
        objective="self-distillation of patches and picture, and local descriptors; no labels",
        architecture="vit_xsmall_patch16_clip_224",
        model_args=DEFAULT_ARGS | {"depth": 4, "patch_size": 14},
        patch=14,
        width=256,
        minutes=13,
        options=(
            *("--weights", '{"regress": 2, "within": 0.5, "across": 0.5, "whole": 0.3}'),
            *("--trust", "0.1", "0.3", "--lr", "8e-4", "--unlabelled-repeat", "1"),
            *("--phases", "0.8:84:24:0.15", "0.2:224:4:0.3"),
        ),
    ),
    "wide-vit": Source(
        objective="which two crops are of one picture (contrast)",
        architecture="vit_base_patch16_224",
        model_args=DEFAULT_ARGS | {"depth": 2},
        patch=16,
        width=768,
        minutes=9,
        plain=True,
        options=(
            *("--objective", "contrast", "--lr", "6e-4", "--strength", "1"),
            *("--phases", "0.8:96:48:0.25", "0.2:176:16:0.3"),
        ),
    ),
}  # fmt: skip


def table() -> str:
    """The sources as lines of text."""
    rows = [
        f"  {name:10} {source.architecture}, patch {source.patch}, width {source.width}, "
        f"{source.minutes:g} min: {source.objective}"
        for name, source in SOURCES.items()
    ]
    return "\n".join(["sources:", *(textwrap.fill(r, 100, subsequent_indent="  ") for r in rows)])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", choices=SOURCES, metavar="NAME", help="see the list below")
    add("--images", type=Path, nargs="*", default=[], help="folders of pictures without labels")
    add(
        "--labelled", type=Path, nargs="*", default=[], help="folders whose sub-folders are classes"
    )
    add("-o", "--output", type=Path, required=True, help="folder of all sources")
    args, more = parser.parse_known_args(argv)
    source = SOURCES[args.source]
    run = args.output / "runs" / args.source
    command = source.command(args.source, args.images, args.labelled, run)
    if "--steps" in more:  # by steps instead of by the clock
        at = command.index("--minutes")
        del command[at : at + 2]
    (train_plain if source.plain else train_backbone).main([*command, *more])

    finished = args.output / f"{args.source}.safetensors"
    partial = finished.with_name(finished.name + ".partial")
    shutil.copy(run / "backbone.safetensors", partial)
    partial.replace(finished)
    with safe_open(str(finished), "pt") as file:
        print(f"{finished}: {file.metadata()['card']}")


if __name__ == "__main__":
    main()
