"""A look at every label file before anything is computed: what it holds, and what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from fmupsample.errors import ImageError, UsageError
from fmupsample.images.find import printable
from fmupsample.images.read import read_size
from fmupsample.labels.classes import (
    COLOUR,
    MOST,
    ClassTable,
    Colour,
    as_colours,
    class_colours,
    value_text,
)
from fmupsample.labels.dataset import Dataset
from fmupsample.labels.matching import Pair
from fmupsample.labels.parsing import Given
from fmupsample.labels.values import read_palette, read_values

_MOST_COLOURS = 4096  # distinct ones in a file: more is a photograph

Sizes = Counter[tuple[int, int]]  # how many pictures have each size (H, W)
_T = TypeVar("_T")


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
    sizes: Sizes

    def share(self) -> np.ndarray:
        """Of each class among the pixels that count."""
        return self.pixels[:-1] / max(1, self.pixels[:-1].sum())

    def rows(self) -> list[tuple[str, str, str, int]]:
        """``(name, value, share, pictures)`` of each class, for a table."""
        table = self.table
        return [
            (name, value_text(value), f"{share:.2%}", int(pictures))
            for name, value, share, pictures in zip(
                table.names, table.values, self.share(), self.pictures, strict=True
            )
        ]


def sizes_text(sizes: Sizes) -> str:
    """``480x360 (367)``: width x height, the most frequent first."""
    shown = ", ".join(f"{w}x{h} ({n})" for (h, w), n in sizes.most_common(3))
    return shown + (f" and {len(sizes) - 3} more" if len(sizes) > 3 else "")


def look_at_all(
    pairs: Sequence[Pair], look: Callable[[Pair, tuple[int, int]], _T], workers: int = 2
) -> tuple[list[_T], Sizes]:
    """``look`` at each pair and the size (H, W) of its picture, in threads; and all sizes."""

    def one(pair: Pair) -> tuple[_T, tuple[int, int]]:
        size = read_size(pair.source.path)
        return look(pair, size), size

    pool = ThreadPoolExecutor(max(1, workers))
    try:
        seen = list(pool.map(one, pairs))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return [found for found, _ in seen], Counter(size for _, size in seen)


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
    counted, sizes = look_at_all(dataset.pairs, _count, workers)
    if any(max(own) >= COLOUR for own in counted) or (table is not None and table.coded_by_colour):
        # A file of grey pixels alone may be among coloured ones.
        counted = [Counter({int(as_colours(np.array(v))): n for v, n in own.items()})
                   for own in counted]  # fmt: skip
    values = _Values(dataset, counted)
    fixed = table is not None
    if table is None:
        table = _settle(values, given, ignored)
    elif ignored is not None:
        table = replace(table, ignored=tuple(v for v in ignored if v not in table.values))
    place = {value: number for number, value in enumerate(table.values)}
    place |= dict.fromkeys(table.ignored, len(table))
    for value in sorted(values.totals):
        if value not in place:
            raise ImageError(table.unknown(value, values.holder(value).labels, fixed=fixed))
    pixels, pictures = (np.zeros(len(table) + 1, np.int64) for _ in range(2))
    for own in counted:
        for value, count in own.items():
            pixels[place[value]] += count
            pictures[place[value]] += 1
    if not pixels[:-1].sum():
        raise UsageError("no pixel of the labels counts: all of them are ignored")
    return Survey(table, pixels, pictures[:-1], sizes)


def _count(pair: Pair, size: tuple[int, int]) -> Counter[int]:
    """How many pixels have each value."""
    values, counts = np.unique(read_values(pair.labels, size), return_counts=True)
    if len(values) > _MOST_COLOURS:
        raise ImageError(
            f"the labels {printable(pair.labels)} hold {len(values)} different "
            f"{'colours' if values[-1] >= COLOUR else 'values'}: this is no label map"
        )
    return Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))


class _Values:
    """The values of all label files of a set."""

    def __init__(self, dataset: Dataset, counted: Sequence[Counter[int]]) -> None:
        self.dataset, self.counted = dataset, counted
        self.totals: Counter[int] = Counter()
        for own in counted:
            self.totals.update(own)

    def holder(self, value: int) -> Pair:
        """The first pair whose labels hold ``value``."""
        return next(
            p for p, own in zip(self.dataset.pairs, self.counted, strict=True) if value in own
        )

    def palette(self, names: Sequence[str], values: Sequence[int]) -> tuple[Colour, ...]:
        """The label files' own colours, if these tell the classes apart."""
        palette = read_palette(self.dataset.pairs[0].labels) or []
        if values[-1] < len(palette):
            own = [palette[v] for v in values]
            if len(set(own)) == len(own):
                return tuple(own)
        return class_colours(names)


def _settle(
    found: _Values, given: Sequence[Given] | None, ignored: Sequence[int] | None
) -> ClassTable:
    own = found.dataset.table
    away = tuple(found.dataset.ignored if ignored is None else ignored)
    values = sorted(v for v in found.totals if v not in away)
    if given is not None:
        return _from_given(found, given, values, away)
    if own is not None:
        return own if ignored is None else replace(own, ignored=away)
    if values and values[-1] >= COLOUR:
        raise _needs_colours(found, [v for v in values if v >= COLOUR])
    if len(values) < 2:
        there = ", ".join(map(str, sorted(found.totals)[:8])) or "nothing"
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
            f"{printable(found.holder(values[-1]).labels)}: {MOST} classes are possible (instance "
            "numbers?)"
        )
    names = tuple(str(v) for v in values)
    return ClassTable(names, tuple(values), found.palette(names, values), away)


def _needs_colours(found: _Values, colours: list[int]) -> ImageError:
    most = sorted(colours, key=lambda v: -found.totals[v])[:8]
    return ImageError(
        f"the labels {printable(found.holder(colours[0]).labels)} are coloured: say with --classes "
        f"which colour is which class (name r g b, one a line); the most frequent of "
        f"{len(colours)} colours: {', '.join(f'#{v - COLOUR:06x}' for v in most)}"
    )


def _from_given(
    found: _Values, given: Sequence[Given], values: list[int], away: tuple[int, ...]
) -> ClassTable:
    if values and values[-1] >= COLOUR:
        without = [g.name for g in given if g.colour is None]
        if without:
            raise UsageError(
                f"the labels are coloured, and --classes has no colour for {without[0]}"
            )
        numbers = [COLOUR | g.colour[0] << 16 | g.colour[1] << 8 | g.colour[2] for g in given]
        others = {int(as_colours(np.array(v))) for v in away} - set(numbers)
        away = tuple(sorted(others))
    else:
        start = 1 if 0 in away and all(g.value is None for g in given) else 0
        numbers = [start + n if g.value is None else g.value for n, g in enumerate(given)]
    names = tuple(g.name for g in given)
    palette = found.palette(names, numbers)
    colours = tuple(g.colour or c for g, c in zip(given, palette, strict=True))
    return ClassTable(names, tuple(numbers), colours, away)
