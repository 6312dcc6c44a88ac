"""Where people keep images and their labels: a row for each layout, and one way to find the pairs.

To add a layout, put a row into :data:`LAYOUTS`. The first that recognises its data is taken, so
that special layouts stand before general ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fmupsample.errors import UsageError
from fmupsample.images.find import printable
from fmupsample.labels.classes import ClassTable
from fmupsample.labels.matching import (
    Found,
    Pair,
    folder_of_split,
    keep_split,
    label_files,
    match,
    need_folder,
    read_split,
)
from fmupsample.labels.published import ADE20K, CITYSCAPES_IDS, CITYSCAPES_TRAIN_IDS, VOC

__all__ = ["LAYOUTS", "Found", "Layout", "Pair", "find_pairs", "recognise"]


@dataclass(frozen=True)
class Kind:
    """Label files of one kind.

    Attributes:
        path: a pattern of their paths.
        table: the classes that they hold, where these are known.
        ignored: values that never count.
    """

    path: str = "*"
    table: ClassTable | None = None
    ignored: tuple[int, ...] = (255,)


@dataclass(frozen=True)
class Layout:
    """A way to keep images and labels, below one root or in two folders.

    Attributes:
        what: the folders, for people.
        images, labels: names below a root, the most usual first; ``"."`` is the root itself.
        marks: patterns of the path of the folder of labels, by which the layout is recognised.
        holds: globs in that folder, which do so too.
        kinds: of label files; the first of which there are any is used, alone.
        image_end, label_ends: regular expressions of what names of images and of label files end
            in, beside what they share. The first end with which there are pairs is used.
        lists: folder below the root with a list of names for each split. Images that no list names
            are then allowed to have no labels. Without it, splits are folders.
        nested: whether a split may also be a folder that is a root itself.
    """

    what: str
    images: tuple[str, ...]
    labels: tuple[str, ...]
    marks: tuple[str, ...] = ()
    holds: tuple[str, ...] = ()
    kinds: tuple[Kind, ...] = (Kind(),)
    image_end: str = ""
    label_ends: tuple[str, ...] = ("",)
    lists: str | None = None
    nested: bool = False


LAYOUTS = {
    "voc": Layout(
        "JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/SPLIT.txt",
        images=("JPEGImages",),
        labels=("SegmentationClass",),
        marks=("SegmentationClass*",),
        kinds=(Kind(table=VOC),),
        lists="ImageSets/Segmentation",
    ),
    "cityscapes": Layout(
        "leftImg8bit/SPLIT/CITY and gtFine/SPLIT/CITY (labelIds or labelTrainIds)",
        images=("leftImg8bit",),
        labels=("gtFine",),
        marks=("gtFine",),
        holds=("**/*_gt*_labelIds.png", "**/*_gt*_labelTrainIds.png"),
        kinds=(
            Kind("*_gt*_labelTrainIds.*", CITYSCAPES_TRAIN_IDS, CITYSCAPES_TRAIN_IDS.ignored),
            Kind("*_gt*_labelIds.*", CITYSCAPES_IDS, CITYSCAPES_IDS.ignored),
        ),
        image_end="_leftImg8bit",
        label_ends=("_gt[^_]*_label(Train)?Ids",),
    ),
    "ade20k": Layout(
        "images/{training,validation} and annotations/{training,validation}, 0 ignored",
        images=("images",),
        labels=("annotations",),
        holds=("**/ADE_*_*.png",),
        kinds=(Kind(table=ADE20K, ignored=ADE20K.ignored),),
    ),
    # In stuffthingmaps the value is the category's number - 1. In the panoptic API's pixelmaps it
    # is the number, and 0 for none. Classes are the values that occur; --classes gives them names.
    "coco": Layout(
        "images/train2017 and stuffthingmaps/train2017 (or annotations/*_pixelmaps)",
        images=("images", "."),
        labels=("stuffthingmaps", "annotations/stuffthingmaps", "annotations"),
        marks=("stuffthingmaps", "stuffthingmaps/*", "*_pixelmaps"),
        holds=("*_pixelmaps",),
        kinds=(Kind("*_pixelmaps/*", ignored=(0, 255)), Kind()),
    ),
    # CamVid as it is published has names of labels that end in _L.
    "folders": Layout(
        "two folders with matching names, or a root with images/ and labels/",
        images=("images", "image", "imgs", "img", "photos", "rgb"),
        labels=("labels", "label", "masks", "mask", "annotations", "annots", "gt", "depth"),
        marks=("*",),
        label_ends=("", "[-_.](segmentation|annotation|labels?|masks?|trimap|depth|seg|gt|l)"),
        nested=True,
    ),
}


def recognise(images: Path, labels: Path | None) -> str:
    """The name of the first layout that two folders, or the root ``images``, look like."""
    for name, layout in LAYOUTS.items():
        below = (images, labels) if labels is not None else _below(layout, images)
        if None not in below and _is_of(layout, below[1]):
            return name
    return "folders"


def find_pairs(name: str, images: Path, labels: Path | None, split: str | None) -> Found:
    """The pairs of the layout ``name``.

    Args:
        labels: ``None``: ``images`` is the root of a data set.
        split: one that the data set has, or a file of names.

    Raises:
        UsageError: no such folder or split, or two label files for one image.
    """
    layout = LAYOUTS[name]
    root = images if labels is None else images.parent
    listed = Path(split) if split is not None and Path(split).is_file() else None
    if listed is not None:
        split = None
    elif split is not None and layout.lists is not None:
        listed, split = _list_of(root / layout.lists, split), None
    if labels is None:
        if split is not None and layout.nested and (root / split).is_dir():
            root, split = root / split, None
        images, labels = _folders(name, root)
    images = folder_of_split(images, split, "pictures")
    labels = folder_of_split(labels, split, "labels")
    found = _match(layout, images, labels)
    if listed is not None:
        return keep_split(found, read_split(listed), listed)
    return replace(found, missing=[]) if layout.lists is not None else found


def _match(layout: Layout, images: Path, labels: Path) -> Found:
    files = label_files(need_folder(labels, "labels"))
    kind = next((k for k in layout.kinds if any(f.match(k.path) for f in files)), layout.kinds[-1])
    files = [file for file in files if file.match(kind.path)]
    found = Found([])
    for end in layout.label_ends:
        found = match(images, labels, files, image_end=layout.image_end, label_end=end)
        if found.pairs:
            break
    return replace(found, table=kind.table, ignored=kind.ignored)


def _is_of(layout: Layout, labels: Path) -> bool:
    return labels.is_dir() and (
        any(labels.match(mark) for mark in layout.marks)
        or any(next(labels.glob(held), None) is not None for held in layout.holds)
    )


def _below(layout: Layout, root: Path) -> tuple[Path | None, Path | None]:
    """The folders of images and of labels of a root, as far as they are there."""
    images, labels = (
        next((root / name for name in names if (root / name).is_dir()), None)
        for names in (layout.images, layout.labels)
    )
    return images, labels


def _folders(name: str, root: Path) -> tuple[Path, Path]:
    """Those of :func:`_below`, or a UsageError that says what is there."""
    images, labels = _below(LAYOUTS[name], need_folder(root, "pictures"))
    if images is None or labels is None:
        below = sorted(p.name for p in root.iterdir() if p.is_dir())[:6]
        layout = LAYOUTS[name]
        raise UsageError(
            f"{printable(root)} has no {layout.images[0]}/ and {layout.labels[0]}/ below it (found "
            f"{', '.join(below) or 'no folders'}): give the folder of the labels after it, name a "
            "--split, or a --layout"
        )
    return images, labels


def _list_of(folder: Path, split: str) -> Path:
    listed = folder / f"{split}.txt"
    if not listed.is_file():
        there = sorted(p.stem for p in folder.glob("*.txt"))
        raise UsageError(
            f"there is no split {split!r}: {printable(listed)} does not exist "
            f"(found {', '.join(there) or 'none'})"
        )
    return listed
