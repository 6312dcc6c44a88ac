"""The labelled pictures of the quality benchmark, as they lie in their folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fmupsample.errors import UsageError
from fmupsample.images.find import Source, find_images

CAMVID = [
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "cyclist",
]


@dataclass(frozen=True)
class Labelled:
    """A picture and the PNG with its classes."""

    source: Source
    file: Path

    def labels(self) -> Tensor:
        """uint8 ``[H, W]``: the class of each pixel, 255 where there is none."""
        with Image.open(self.file) as picture:
            return torch.from_numpy(np.array(picture, dtype=np.uint8))


def camvid(root: Path, split: str, limit: int | None = None) -> list[Labelled]:
    """``split`` (``train`` or ``val``); ``limit`` takes that many, evenly spread."""
    found = _pairs(root / split / "images", root / split / "labels")
    if limit is None or limit >= len(found):
        return found
    chosen = np.linspace(0, len(found) - 1, limit).round().astype(int)
    return [found[i] for i in chosen]


def davis(root: Path, limit: int | None = None) -> dict[str, list[Labelled]]:
    """The frames of each sequence in their order; ``limit`` takes that many sequences."""
    folders = sorted(p for p in (root / "images").glob("*") if p.is_dir())[:limit]
    if not folders:
        raise UsageError(f"{root} has no sequences: images/SEQUENCE and labels/SEQUENCE")
    found = {p.name: _pairs(p, root / "labels" / p.name) for p in folders}
    short = [name for name, frames in found.items() if len(frames) < 2]
    if short:
        raise UsageError(f"{root}: a sequence needs two frames or more, {short} have not")
    return found


def _pairs(images: Path, labels: Path) -> list[Labelled]:
    """Pictures with the label of the same stem."""
    found = []
    for source in find_images([images]):
        file = labels / f"{Path(source.relative).stem}.png"
        if not file.is_file():
            raise UsageError(f"{source} has no labels: {file} does not exist")
        found.append(Labelled(Source(source.path, PurePosixPath(source.path.name)), file))
    return found
