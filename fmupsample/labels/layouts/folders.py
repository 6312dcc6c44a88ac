"""Parallel folders: pictures in one, labels of the same names in another, nested or not.

Where no name is the same, ``a_mask.png`` (``_label``, ``_gt``, ``_L``, ...) belongs to ``a.jpg``.

Given as two folders, or as a root with ``images/`` and ``labels/`` (or the like) below it, or below
``train/``, ``val/``, ...
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from fmupsample.errors import UsageError
from fmupsample.images.find import Source, printable
from fmupsample.labels.layouts.matching import (
    Found,
    keep_split,
    match,
    need_folder,
    read_split,
)

NAME = "folders"
WHAT = "two folders with matching names, or a root with images/ and labels/"

_IMAGES = ("images", "image", "imgs", "img", "photos", "rgb")
_LABELS = ("labels", "label", "masks", "mask", "annotations", "annots", "gt", "depth")
# CamVid as it is published has _L.
_END = re.compile(
    r"(.+)[-_.](segmentation|annotation|labels?|masks?|trimap|depth|seg|gt|l)", re.IGNORECASE
)


def recognises(images: Path, labels: Path | None) -> bool:
    return True


def find(images: Path, labels: Path | None, split: str | None) -> Found:
    """``split``: a folder below the root, or below both folders; or a file of names."""
    listed = Path(split) if split is not None and Path(split).is_file() else None
    if split is not None and listed is None:
        images, labels = _split(images, labels, split)
    if labels is None:
        images, labels = _below(images)
    found = match(images, labels)
    if not found.pairs and found.orphans:
        found = match(images, labels, label_key=_without_end)
    return found if listed is None else keep_split(found, read_split(listed), listed)


def _without_end(path: PurePosixPath) -> PurePosixPath:
    """``sub/a_mask.png`` -> ``sub/a``, for the ends that people give to names of labels."""
    ended = _END.fullmatch(path.stem)
    return path.with_name(ended[1] if ended else path.stem)


def _split(images: Path, labels: Path | None, split: str) -> tuple[Path, Path | None]:
    if labels is not None and (images / split).is_dir() and (labels / split).is_dir():
        return images / split, labels / split
    if labels is None and (images / split).is_dir():
        return images / split, None
    if labels is None:
        inner, outer = _below(images)
        if (inner / split).is_dir() and (outer / split).is_dir():
            return inner / split, outer / split
    raise UsageError(
        f"there is no split {split!r}: neither a file of names, nor a folder below "
        f"{printable(images)}{'' if labels is None else ' and ' + printable(labels)}"
    )


def _below(root: Path) -> tuple[Path, Path]:
    """``images/`` and ``labels/`` of a root."""
    need_folder(root, "pictures")
    pictures = [root / name for name in _IMAGES if (root / name).is_dir()]
    labels = [root / name for name in _LABELS if (root / name).is_dir()]
    if not pictures or not labels:
        below = sorted(p.name for p in root.iterdir() if p.is_dir())[:6]
        raise UsageError(
            f"{printable(root)} has no images/ and labels/ below it (found "
            f"{', '.join(below) or 'no folders'}): give the folder of the labels after it, name a "
            "--split, or a --layout"
        )
    return pictures[0], labels[0]


def find_labels(
    folders: Sequence[Path], sources: Sequence[Source], *, of_all: bool = True
) -> dict[Source, Path]:
    """The label file of each picture: the same path below one of ``folders``, ending in ``.png``.

    A picture in ``sub/a.jpg`` has its labels in ``sub/a.png``, or in ``a.png``.

    Args:
        of_all: every picture must have labels; else one of them.

    Raises:
        UsageError: no such folder, or pictures without labels.
    """
    for folder in folders:
        need_folder(folder, "labels")
    found, missing = {}, []
    for source in sources:
        relative = Path(*source.relative.parts).with_suffix(".png")
        for path in (f / name for f in folders for name in (relative, relative.name)):
            if path.is_file():
                found[source] = path
                break
        else:
            missing.append(source)
    if missing and (of_all or not found):
        raise UsageError(
            f"{len(missing)} of {len(sources)} pictures have no labels in "
            f"{', '.join(map(printable, folders))}: {missing[0]} needs "
            f"{missing[0].relative.with_suffix('.png')} there"
        )
    return found
