"""A labelled set as a run uses it: the pairs that a layout finds, and their class numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fmupsample.errors import FmupsampleError, UsageError
from fmupsample.images.find import printable
from fmupsample.images.read import read_size
from fmupsample.labels.classes import ClassTable
from fmupsample.labels.layouts import LAYOUTS, find_pairs, recognise
from fmupsample.labels.matching import LABEL_SUFFIXES, Found, Pair, need_folder
from fmupsample.labels.values import read_values


@dataclass
class Dataset(Found):
    """What was found, and by which layout."""

    layout: str = "folders"


def open_dataset(
    images: str | Path,
    labels: str | Path | None = None,
    *,
    layout: str | None = None,
    split: str | None = None,
    allow_missing: bool = False,
) -> Dataset:
    """Find the pairs below ``images`` and ``labels`` (or below the one root ``images``).

    Args:
        layout: a name in :data:`LAYOUTS`; by default the first that recognises the folders.
        split: one that the layout knows (``train``), or a file of names.
        allow_missing: leave out pictures without labels instead of refusing them.

    Raises:
        UsageError: no such folder, layout or split; no pairs; pictures without labels.
    """
    images = need_folder(Path(images), "pictures")
    labels = None if labels is None else need_folder(Path(labels), "labels")
    if labels is not None and labels.resolve() == images.resolve():
        raise UsageError(
            f"{printable(images)} is given for pictures and for labels: keep them in two folders"
        )
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"layout {layout!r} is unknown: use {', '.join(LAYOUTS)}")
    name = layout or recognise(images, labels)
    found = find_pairs(name, images, labels, split)
    if (found.missing and not allow_missing) or not found.pairs:
        raise UsageError(_missing_text(found, images if labels is None else labels, name))
    return Dataset(**vars(found), layout=name)


def _missing_text(found: Found, where: Path, layout: str) -> str:
    total = len(found.pairs) + len(found.missing)
    shown = ", ".join(str(source) for source in found.missing[:3])
    shown += ", ..." if len(found.missing) > 3 else ""
    text = (
        f"{len(found.missing)} of {total} pictures have no labels in {printable(where)} (layout "
        f"{layout}): {shown}"
    )
    if found.orphans:
        text += f"; {len(found.orphans)} label files have no picture, such as "
        text += printable(found.orphans[0])
    elif not found.pairs:
        text += f"; no label files are there ({' '.join(s[1:] for s in LABEL_SUFFIXES)}; JPEG blurs"
        text += " numbers and is not read)"
    if found.pairs:
        return f"{text}; --allow-missing leaves such pictures out"
    return f"{text}; labels have the pictures' names; --layout takes {', '.join(LAYOUTS)}"


def read_pair(pair: Pair, table: ClassTable) -> np.ndarray:
    """Class numbers of a picture, uint8 ``[H, W]``, :data:`IGNORE` where none counts."""
    try:
        return table.encode(read_values(pair.labels, read_size(pair.source.path)), pair.labels)
    except OSError as error:
        raise FmupsampleError(f"{printable(pair.labels)} cannot be read: {error}") from error
