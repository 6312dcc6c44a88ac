"""Classes: their names and colours, and the numbers by which label files know them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from fmupsample.errors import ImageError, UsageError
from fmupsample.images.find import printable

IGNORE = 255  # among class numbers: a pixel that does not count
MOST = 255  # classes, so that a class and IGNORE fit into a byte
COLOUR = 1 << 24  # added to packed colours
Colour = tuple[int, int, int]


def pack_colours(pixels: np.ndarray) -> np.ndarray:
    """uint8 ``[..., 3]`` -> int32 ``[...]``, beyond every grey value."""
    wide = pixels.astype(np.int32)
    return COLOUR | wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]


def as_colours(values: np.ndarray) -> np.ndarray:
    """Grey values of a file whose pixels are all grey, as colours; colours stay."""
    return np.where(values >= COLOUR, values, COLOUR | values * 0x010101)


def value_text(value: int) -> str:
    """A value of a label file for a message: ``12`` or ``colour #8040ff``."""
    return f"colour #{value - COLOUR:06x}" if value >= COLOUR else str(value)


def parse_colour(given: Any) -> Colour:
    """``"#8040ff"`` or three numbers from 0 to 255; a ValueError for anything else."""
    if isinstance(given, str):
        if not re.fullmatch(r"#?[0-9a-fA-F]{6}", given):
            raise ValueError(f"colour {given!r} is not #rrggbb")
        given = bytes.fromhex(given.removeprefix("#"))
    colour = [int(c) for c in given]
    if len(colour) != 3 or not all(0 <= c <= 255 for c in colour):
        raise ValueError(f"colour {colour} is not three numbers from 0 to 255")
    return colour[0], colour[1], colour[2]


def default_colour(number: int) -> Colour:
    """The colour PASCAL VOC gives to an index: far apart for small ones, black for 0."""
    red = green = blue = 0
    for bit in range(7, -1, -1):
        red |= (number & 1) << bit
        green |= (number >> 1 & 1) << bit
        blue |= (number >> 2 & 1) << bit
        number >>= 3
    return red, green, blue


# Told apart side by side and over a photograph, which the first colours of VOC (dark red, darker
# red, olive) are not.
_DISTINCT: tuple[Colour, ...] = tuple(
    (number >> 16, number >> 8 & 255, number & 255)
    for number in (
        0x4285D6, 0xE77E31, 0x44A350, 0xCE383D, 0x8C5EB5, 0xF0C842, 0x6C4D3C, 0xEA86BA,
        0x40BEC4, 0x96A0A8, 0xAAC83C, 0x184882, 0x781446, 0xFFB28C, 0x1E6246, 0xBEAAEB,
        0xB28C3E, 0x5ADC96, 0xDC1E8C, 0x46464C, 0xA0D7F5, 0x6E781E, 0xFFEBAA, 0x5F2314,
    )
)  # fmt: skip
_NOTHING = ("background", "void", "other", "none", "unlabeled", "unlabelled", "0")


def class_colours(names: Sequence[str]) -> tuple[Colour, ...]:
    """Colours of classes that bring none along: black for a background, else far apart."""
    colours: list[Colour] = []
    further = chain(_DISTINCT, map(default_colour, count(len(_DISTINCT) + 1)))
    for name in names:
        black = name.lower() in _NOTHING and (0, 0, 0) not in colours
        colours.append((0, 0, 0) if black else next(further))
    return tuple(colours)


@dataclass(frozen=True)
class ClassTable:
    """The classes of a data set, in the order in which a probe numbers them.

    Attributes:
        names: one each.
        values: what stands for each in the label files; packed colours where they are colour-coded.
        colours: for masks and legends.
        ignored: values of pixels that do not count.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    colours: tuple[Colour, ...]
    ignored: tuple[int, ...] = (IGNORE,)

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.values) == len(self.colours):
            raise UsageError("every class needs a name, a value and a colour")
        if not 2 <= len(self.names) <= MOST:
            raise UsageError(f"{len(self.names)} classes are not possible: give 2 to {MOST}")
        same = [n for n in set(self.names) if self.names.count(n) > 1]
        if same:
            raise UsageError(f"two classes are called {min(same)}: give them different names")
        twice = [v for v in set(self.values) if self.values.count(v) > 1]
        if twice:
            raise UsageError(f"two classes have the value {value_text(min(twice))}")
        odd = [v for v in (*self.values, *self.ignored) if not -(2**31) <= v < 2 * COLOUR]
        if odd:
            raise UsageError(f"{str(odd[0])[:20]} is no value of a label file")
        both = sorted(set(self.values) & set(self.ignored))
        if both:
            raise UsageError(
                f"{value_text(both[0])} is a class ({self.names[self.values.index(both[0])]}) and "
                "ignored at once"
            )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def coded_by_colour(self) -> bool:
        return max(self.values) >= COLOUR

    @property
    def indices(self) -> tuple[int, ...]:
        """The number of each class in a mask: its value, or its place where values are colours."""
        if max(self.values) > 255:
            return tuple(range(len(self)))
        return self.values

    def encode(self, values: np.ndarray, where: Path) -> np.ndarray:
        """Values of a label file -> class numbers uint8, :data:`IGNORE` where none counts.

        Raises:
            ImageError: a value that is neither a class nor ignored; names the file.
        """
        if self.coded_by_colour:
            values = as_colours(values)
        known = np.array([*self.values, *self.ignored], np.int64)
        numbers = np.array([*range(len(self)), *[IGNORE] * len(self.ignored)], np.uint8)
        order = np.argsort(known)
        known, numbers = known[order], numbers[order]
        found = np.searchsorted(known, values).clip(max=len(known) - 1)
        wrong = known[found] != values
        if wrong.any():
            y, x = np.argwhere(wrong)[0]
            raise ImageError(self.unknown(int(values[y, x]), where, f" at x {x}, y {y}"))
        return numbers[found]

    def unknown(self, value: int, where: Path, place: str = "", *, fixed: bool = False) -> str:
        """The message about a value that is neither a class nor ignored.

        Args:
            fixed: the classes are those of a probe, not to be named anew.
        """
        given = value_text(value)
        option = f"'#{value - COLOUR:06x}'" if value >= COLOUR else given
        remedy = "" if fixed else "name it in --classes, or "
        listed = [value_text(v) for v in self.values[:4]] + ["..."] * (len(self) > 4)
        return (
            f"the labels {printable(where)} hold {given}{place}, which is none of the {len(self)} "
            f"classes ({', '.join(listed)}): {remedy}give --ignore {option}"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "values": list(self.values),
            "colours": [list(c) for c in self.colours],
            "ignored": list(self.ignored),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ClassTable:
        """Raises UsageError, KeyError, TypeError or ValueError for anything else."""
        colours = tuple(parse_colour(c) for c in data["colours"])
        names = tuple(data["names"])
        if not all(isinstance(n, str) for n in names):
            raise TypeError("class names must be text")
        values, ignored = (tuple(int(v) for v in data[k]) for k in ("values", "ignored"))
        return cls(names, values, colours, ignored)


def table_of(
    names: Sequence[str], ignored: Sequence[int] = (IGNORE,), first: int = 0
) -> ClassTable:
    """Classes numbered from ``first`` on, in the usual colours."""
    values = tuple(range(first, first + len(names)))
    colours = tuple(default_colour(v) for v in values)
    return ClassTable(tuple(names), values, colours, tuple(ignored))
