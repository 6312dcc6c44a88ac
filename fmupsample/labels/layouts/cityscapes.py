"""Cityscapes: ``leftImg8bit/SPLIT/CITY/*_leftImg8bit.png`` and ``gtFine/SPLIT/CITY/*``.

``*_gtFine_labelTrainIds.png`` where they were made, else ``*_gtFine_labelIds.png``; of both, the 19
classes of the benchmark count.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from fmupsample.labels.classes import ClassTable
from fmupsample.labels.layouts.matching import (
    Found,
    keep_split,
    label_files,
    match,
    read_split,
    split_folder,
)

NAME = "cityscapes"
WHAT = "leftImg8bit/SPLIT/CITY and gtFine/SPLIT/CITY (labelIds or labelTrainIds)"

# name, id, colour; the place in this list is the train id.
_CLASSES = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)
_NAMES = tuple(name for name, _, _ in _CLASSES)
_IDS = tuple(number for _, number, _ in _CLASSES)
_COLOURS = tuple(colour for _, _, colour in _CLASSES)
_OTHER_IDS = tuple(n for n in range(34) if n not in _IDS)
TABLES = {
    "labelTrainIds": ClassTable(_NAMES, tuple(range(19)), _COLOURS, (254, 255)),
    "labelIds": ClassTable(_NAMES, _IDS, _COLOURS, (*_OTHER_IDS, 255)),
}
_PICTURE_END, _ENDS = "_leftImg8bit", tuple(TABLES)


def recognises(images: Path, labels: Path | None) -> bool:
    if labels is None:
        return (images / "leftImg8bit").is_dir() and (images / "gtFine").is_dir()
    return labels.is_dir() and any(
        next(labels.rglob(f"*_gt*_{end}.png"), None) is not None for end in _ENDS
    )


def find(images: Path, labels: Path | None, split: str | None) -> Found:
    if labels is None:
        images, labels = images / "leftImg8bit", images / "gtFine"
    listed = Path(split) if split is not None and Path(split).is_file() else None
    if split is not None and listed is None:
        images = split_folder(images, split, "pictures")
        labels = split_folder(labels, split, "labels")
    files = label_files(labels)
    end = next((e for e in _ENDS if any(f.stem.endswith(f"_{e}") for f in files)), "labelIds")
    found = match(
        images,
        labels,
        picture_key=lambda p: p.with_name(p.stem.removesuffix(_PICTURE_END)),
        label_key=lambda p: p.with_name(p.stem.rpartition("_gt")[0]),
        wanted=lambda p: _is(p, end),
        files=files,
    )
    found.table, found.ignored = TABLES[end], TABLES[end].ignored
    return found if listed is None else keep_split(found, read_split(listed), listed)


def _is(path: PurePosixPath, end: str) -> bool:
    return path.stem.endswith(f"_{end}") and "_gt" in path.stem
