"""A labelled set as a run uses it: its pairs, its classes, and what a look at every label shows."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fmupsample.errors import FmupsampleError, ImageError, UsageError
from fmupsample.images.find import printable
from fmupsample.images.read import read_size
from fmupsample.labels.classes import (
    COLOUR,
    IGNORE,
    MOST,
    ClassTable,
    Colour,
    Given,
    as_colours,
    class_colours,
    value_text,
)
from fmupsample.labels.layouts import LAYOUTS, Found, Pair
from fmupsample.labels.layouts.matching import LABEL_SUFFIXES
from fmupsample.labels.values import read_palette, read_values

_MOST_COLOURS = 4096  # distinct ones in a file: more is a photograph


@dataclass
class Dataset:
    """Pairs in a layout.

    Attributes:
        missing: pictures without labels; orphans: labels without a picture.
        table: classes that the layout brings along.
        ignored: values that do not count in this layout.
    """

    layout: str
    pairs: list[Pair]
    missing: list = field(default_factory=list)
    orphans: list[Path] = field(default_factory=list)
    table: ClassTable | None = None
    ignored: tuple[int, ...] = (IGNORE,)


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
    images, labels = Path(images), None if labels is None else Path(labels)
    for folder, what in ((images, "pictures"), (labels, "labels")):
        if folder is not None and not folder.is_dir():
            kind = "is not a folder" if folder.exists() else "does not exist"
            raise UsageError(f"the folder of {what} {printable(folder)} {kind}")
    if labels is not None and labels.resolve() == images.resolve():
        raise UsageError(
            f"{printable(images)} is given for pictures and for labels: keep them in two folders"
        )
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"layout {layout!r} is unknown: use {', '.join(LAYOUTS)}")
    name = layout or next(n for n, m in LAYOUTS.items() if m.recognises(images, labels))
    found: Found = LAYOUTS[name].find(images, labels, split)
    if (found.missing and not allow_missing) or not found.pairs:
        raise UsageError(_missing_text(found, images, labels, name))
    return Dataset(name, found.pairs, found.missing, found.orphans, found.table, found.ignored)


def _missing_text(found: Found, images: Path, labels: Path | None, layout: str) -> str:
    total = len(found.pairs) + len(found.missing)
    shown = ", ".join(str(source) for source in found.missing[:3])
    shown += ", ..." if len(found.missing) > 3 else ""
    where = printable(images if labels is None else labels)
    text = (
        f"{len(found.missing)} of {total} pictures have no labels in {where} (layout {layout}): "
        f"{shown}"
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


# -- a look at every label ------------------------------------------------------------------------


@dataclass
class Survey:
    """What the label files hold.

    Attributes:
        table: the classes.
        pixels: of each class, and last of those that do not count; int64 ``[classes + 1]``.
        pictures: that show each class.
        sizes: how many pictures have each size (H, W).
    """

    table: ClassTable
    pixels: np.ndarray
    pictures: np.ndarray
    sizes: dict[tuple[int, int], int]

    def share(self) -> np.ndarray:
        """Of each class among the pixels that count."""
        return self.pixels[:-1] / max(1, self.pixels[:-1].sum())

    def sizes_text(self) -> str:
        """``480x360 (367)``: width x height, the most frequent first."""
        ordered = sorted(self.sizes.items(), key=lambda item: -item[1])
        shown = [f"{w}x{h} ({n})" for (h, w), n in ordered[:3]]
        more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
        return ", ".join(shown) + more


@dataclass
class _Counted:
    size: tuple[int, int]
    values: np.ndarray
    counts: np.ndarray


def survey(
    dataset: Dataset,
    table: ClassTable | None = None,
    *,
    given: Sequence[Given] | None = None,
    ignored: Sequence[int] | None = None,
    workers: int = 2,
) -> Survey:
    """Read every label file once, check it, and settle what the classes are.

    They are ``table`` (of a probe), or ``given`` (``--classes``), or the layout's own, or those
    that occur: 0 to the largest value if most of these occur, else the values that do.

    Args:
        ignored: values that do not count instead of the layout's (``--ignore``).

    Raises:
        UsageError: classes that cannot be.
        ImageError: a file that cannot be read, is not of its picture's size, or holds a value that
            is no class; it is named.
    """
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        counted = list(pool.map(_count, dataset.pairs))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    coded = any(one.values[-1] >= COLOUR for one in counted)
    if coded or (table is not None and table.coded_by_colour):
        for one in counted:  # a file of grey pixels alone among coloured ones
            one.values = as_colours(one.values)
    totals: dict[int, int] = {}
    first: dict[int, Path] = {}
    sizes: dict[tuple[int, int], int] = {}
    for pair, one in zip(dataset.pairs, counted, strict=True):
        sizes[one.size] = sizes.get(one.size, 0) + 1
        for value, count in zip(one.values.tolist(), one.counts.tolist(), strict=True):
            totals[value] = totals.get(value, 0) + count
            first.setdefault(value, pair.labels)
    fixed = table is not None
    if table is None:
        table = _settle(dataset, totals, first, given, ignored)
    elif ignored is not None:
        table = replace(table, ignored=tuple(v for v in ignored if v not in table.values))
    place = {value: number for number, value in enumerate(table.values)}
    place |= dict.fromkeys(table.ignored, len(table))
    for value in sorted(totals):
        if value not in place:
            raise ImageError(table.unknown(value, first[value], fixed=fixed))
    pixels, pictures = (np.zeros(len(table) + 1, np.int64) for _ in range(2))
    for one in counted:
        for value, count in zip(one.values.tolist(), one.counts.tolist(), strict=True):
            pixels[place[value]] += count
            pictures[place[value]] += 1
    if not pixels[:-1].sum():
        raise UsageError("no pixel of the labels counts: all of them are ignored")
    return Survey(table, pixels, pictures[:-1], sizes)


def _count(pair: Pair) -> _Counted:
    size = read_size(pair.source.path)
    values, counts = np.unique(read_values(pair.labels, size), return_counts=True)
    if len(values) > _MOST_COLOURS:
        raise ImageError(
            f"the labels {printable(pair.labels)} hold {len(values)} different "
            f"{'colours' if values[-1] >= COLOUR else 'values'}: this is no label map"
        )
    return _Counted(size, values, counts)


def _settle(
    dataset: Dataset,
    totals: dict[int, int],
    first: dict[int, Path],
    given: Sequence[Given] | None,
    ignored: Sequence[int] | None,
) -> ClassTable:
    away = tuple(dataset.ignored if ignored is None else ignored)
    values = sorted(v for v in totals if v not in away)
    if given is not None:
        return _from_given(dataset, given, values, away)
    if dataset.table is not None:
        return dataset.table if ignored is None else replace(dataset.table, ignored=away)
    coloured = [v for v in values if v >= COLOUR]
    if coloured:
        most = sorted(coloured, key=lambda v: -totals[v])[:8]
        raise ImageError(
            f"the labels {printable(first[coloured[0]])} are coloured: say with --classes which "
            f"colour is which class (name r g b, one a line); the most frequent of "
            f"{len(coloured)} colours: {', '.join(f'#{v - COLOUR:06x}' for v in most)}"
        )
    if len(values) < 2:
        there = ", ".join(map(str, sorted(totals)[:8])) or "nothing"
        left = ", ".join(map(str, away)) or "none"
        raise UsageError(
            f"the labels hold fewer than two classes: found {there}, ignored {left}; "
            "--ignore none counts every value"
        )
    if values[-1] < 2 * len(values):
        values = [v for v in range(values[-1] + 1) if v not in away]
    if len(values) > MOST:
        raise UsageError(
            f"the labels hold {len(values)} different values, such as {values[-1]} in "
            f"{printable(first[values[-1]])}: {MOST} classes are possible (instance numbers?)"
        )
    names = tuple(str(v) for v in values)
    return ClassTable(names, tuple(values), _colours(dataset, names, values), away)


def _from_given(
    dataset: Dataset, given: Sequence[Given], found: list[int], away: tuple[int, ...]
) -> ClassTable:
    coded = any(v >= COLOUR for v in found)
    if coded:
        without = [g.name for g in given if g.colour is None]
        if without:
            raise UsageError(
                f"the labels are coloured, and --classes has no colour for {without[0]}"
            )
        values = [COLOUR | g.colour[0] << 16 | g.colour[1] << 8 | g.colour[2] for g in given]
        away = {v if v >= COLOUR else COLOUR | v * 0x010101 for v in away}
        away = tuple(sorted(away - set(values)))
    else:
        start = 1 if 0 in away and all(g.value is None for g in given) else 0
        values = [start + n if g.value is None else g.value for n, g in enumerate(given)]
    names = tuple(g.name for g in given)
    palette = _colours(dataset, names, values)
    colours = tuple(g.colour or c for g, c in zip(given, palette, strict=True))
    return ClassTable(names, tuple(values), colours, away)


def _colours(dataset: Dataset, names: Sequence[str], values: Sequence[int]) -> tuple[Colour, ...]:
    """The label files' own palette, if it tells the classes apart."""
    palette = read_palette(dataset.pairs[0].labels) or []
    if values[-1] < len(palette):
        own = [palette[v] for v in values]
        if len(set(own)) == len(own):
            return tuple(own)
    return class_colours(names)


def histogram_rows(found: Survey) -> list[tuple[str, str, str, int]]:
    """``(name, value, share, pictures)`` of each class, for a table."""
    return [
        (name, value_text(value), f"{share:.2%}", int(pictures))
        for name, value, share, pictures in zip(
            found.table.names, found.table.values, found.share(), found.pictures, strict=True
        )
    ]


def read_pair(pair: Pair, table: ClassTable) -> np.ndarray:
    """Class numbers of a picture, uint8 ``[H, W]``, :data:`IGNORE` where none counts."""
    try:
        return table.encode(read_values(pair.labels, read_size(pair.source.path)), pair.labels)
    except OSError as error:
        raise FmupsampleError(f"{printable(pair.labels)} cannot be read: {error}") from error
