"""COCO as indexed PNGs: ``images/train2017/*.jpg`` and stuff maps of the same names.

The maps of COCO-Stuff (``stuffthingmaps/``, value = category id - 1) and of the panoptic API's
conversion (``*_pixelmaps/``, value = category id, 0 for none). Classes are the values that occur;
``--classes`` gives them names.
"""

from __future__ import annotations

from pathlib import Path

from fmupsample.errors import UsageError
from fmupsample.images.find import printable
from fmupsample.labels.layouts.matching import Found, keep_split, match, read_split

NAME = "coco"
WHAT = "images/train2017 and stuffthingmaps/train2017 (or annotations/*_pixelmaps)"

_MAPS = ("stuffthingmaps", "annotations/stuffthingmaps", "annotations")


def recognises(images: Path, labels: Path | None) -> bool:
    if labels is not None:
        return _is_map(labels)
    return _maps(images) is not None


def _is_map(folder: Path) -> bool:
    return "stuffthingmaps" in folder.parts[-2:] or folder.name.endswith("_pixelmaps")


def _maps(root: Path) -> Path | None:
    for name in _MAPS:
        folder = root / name
        if (folder.is_dir() and _is_map(folder)) or any(folder.glob("*_pixelmaps")):
            return folder
    return None


def find(images: Path, labels: Path | None, split: str | None) -> Found:
    listed = Path(split) if split is not None and Path(split).is_file() else None
    if labels is None:
        root, maps = images, _maps(images)
        if maps is None:
            raise UsageError(f"{printable(root)} has no stuffthingmaps/ and no *_pixelmaps/")
        name = None if listed else split
        images, labels = _folder(root / "images", root, name), _folder(maps, maps, name)
    found = match(images, labels)
    pixelmaps = labels.name.endswith("_pixelmaps") or any(labels.glob("*_pixelmaps"))
    found.ignored = (0, 255) if pixelmaps else (255,)
    return found if listed is None else keep_split(found, read_split(listed), listed)


def _folder(root: Path, otherwise: Path, split: str | None) -> Path:
    """The folder of a split: ``train`` is also ``train2017`` and ``stuff_train2017_pixelmaps``."""
    root = root if root.is_dir() else otherwise
    if split is None:
        return root
    matching = [p for p in sorted(root.iterdir()) if p.is_dir() and split in p.name]
    if not matching:
        raise UsageError(f"there is no split {split!r} in {printable(root)}")
    return matching[0]
