"""PASCAL VOC: ``JPEGImages/``, ``SegmentationClass/``, names in ``ImageSets/Segmentation/``."""

from __future__ import annotations

from pathlib import Path

from fmupsample.errors import UsageError
from fmupsample.images.find import printable
from fmupsample.labels.classes import table_of
from fmupsample.labels.layouts.matching import Found, keep_split, match, read_split

NAME = "voc"
WHAT = "JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/SPLIT.txt"

_CLASSES = (
    "background,aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse,"
    "motorbike,person,pottedplant,sheep,sofa,train,tvmonitor"
)
TABLE = table_of(_CLASSES.split(","))


def recognises(images: Path, labels: Path | None) -> bool:
    if labels is not None:
        return labels.name.startswith("SegmentationClass")
    return (images / "JPEGImages").is_dir() and (images / "SegmentationClass").is_dir()


def find(images: Path, labels: Path | None, split: str | None) -> Found:
    """Without a split, every picture that has labels: most pictures of VOC have none."""
    root = images if labels is None else images.parent
    if labels is None:
        images, labels = root / "JPEGImages", root / "SegmentationClass"
    found = match(images, labels)
    found.table = TABLE
    if split is None:
        found.missing = []
        return found
    listed = Path(split)
    if not listed.is_file():
        listed = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not listed.is_file():
        folder = listed.parent
        there = sorted(p.stem for p in folder.glob("*.txt")) if folder.is_dir() else []
        raise UsageError(
            f"there is no split {split!r}: {printable(listed)} does not exist "
            f"(found {', '.join(there) or 'none'})"
        )
    return keep_split(found, read_split(listed), listed)
