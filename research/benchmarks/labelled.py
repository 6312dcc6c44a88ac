"""The labelled pictures of the benchmarks, as they lie in their folders.

CamVid and CCP: ``train/`` and ``val/``, each with ``images/`` and ``labels/``; DAVIS: a folder for
each sequence below ``images/`` and ``labels/``. Labels are PNGs with a class for each pixel, 255
where there is none.
"""

from __future__ import annotations

from pathlib import Path

from fmupsample.bench.quality import spread
from fmupsample.errors import UsageError
from fmupsample.labels import open_dataset
from fmupsample.labels.classes import ClassTable, default_colour
from fmupsample.labels.layouts import Pair


def _table(*names: str) -> ClassTable:
    """Classes that are numbered from 0."""
    numbers = tuple(range(len(names)))
    return ClassTable(names, numbers, tuple(default_colour(n) for n in numbers))


CAMVID = _table(
    *("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car"),
    *("pedestrian", "cyclist"),
)
DAVIS = _table("ground", "object")


def camvid(root: Path, split: str, limit: int | None = None) -> list[Pair]:
    """``split`` (``train`` or ``val``); ``limit`` takes that many, evenly spread."""
    pairs = open_dataset(root / split).pairs
    return spread(pairs, limit or len(pairs))


def davis(root: Path, limit: int | None = None) -> dict[str, list[Pair]]:
    """The frames of each sequence in their order; ``limit`` takes that many sequences."""
    folders = sorted(p for p in (root / "images").glob("*") if p.is_dir())[:limit]
    if not folders:
        raise UsageError(f"{root} has no sequences: images/SEQUENCE and labels/SEQUENCE")
    found = {p.name: open_dataset(p, root / "labels" / p.name).pairs for p in folders}
    short = [name for name, frames in found.items() if len(frames) < 2]
    if short:
        raise UsageError(f"{root}: a sequence needs two frames or more, {short} have not")
    return found
