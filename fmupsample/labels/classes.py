"""Classes: their names and colours, and the numbers by which label files know them."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
_DISTINCT: tuple[Colour, ...] = (
    (66, 133, 214),
    (231, 126, 49),
    (68, 163, 80),
    (206, 56, 61),
    (140, 94, 181),
    (240, 200, 66),
    (108, 77, 60),
    (234, 134, 186),
    (64, 190, 196),
    (150, 160, 168),
    (170, 200, 60),
    (24, 72, 130),
    (120, 20, 70),
    (255, 178, 140),
    (30, 98, 70),
    (190, 170, 235),
    (178, 140, 62),
    (90, 220, 150),
    (220, 30, 140),
    (70, 70, 76),
    (160, 215, 245),
    (110, 120, 30),
    (255, 235, 170),
    (95, 35, 20),
)
_NOTHING = ("background", "void", "other", "none", "unlabeled", "unlabelled", "0")


def class_colours(names: Sequence[str]) -> tuple[Colour, ...]:
    """Colours of classes that bring none along: black for a background, else far apart."""
    colours, next_one = [], 0
    for name in names:
        if name.lower() in _NOTHING and (0, 0, 0) not in colours:
            colours.append((0, 0, 0))
            continue
        few = next_one < len(_DISTINCT)
        colours.append(_DISTINCT[next_one] if few else default_colour(next_one + 1))
        next_one += 1
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
        colours = tuple(_colour(c) for c in data["colours"])
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


# -- what people write ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """A class as ``--classes`` names it; what is ``None`` was left open."""

    name: str
    value: int | None = None
    colour: Colour | None = None


def parse_classes(text: str) -> list[Given]:
    """From ``"sky,road,car"``, or from a file: JSON, CSV with a header, or one class a line.

    JSON: a list of names, a list of ``{"name", "value", "colour"}``, or ``{"0": "sky", ...}``.
    CSV: columns ``name`` and, where wanted, ``value`` and ``r``, ``g``, ``b``. Lines: ``name``,
    ``name r g b``, ``r g b name``, ``name #rrggbb``, each with ``value:`` before it or not.

    Raises:
        UsageError: says which entry is not understood.
    """
    path = Path(text)
    try:
        is_file = path.is_file()
    except OSError:  # a list of names too long for a path
        is_file = False
    if not is_file:
        if path.suffix.lower() in (".json", ".csv", ".txt"):
            raise UsageError(f"--classes: the file {printable(path)} does not exist")
        given = [Given(name.strip()) for name in text.split(",")]
    else:
        try:
            content = path.read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--classes: {printable(path)} cannot be read: {error}") from error
        try:
            given = _from_text(content, path.suffix.lower())
        except (
            ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError,
            csv.Error,
        ) as error:  # fmt: skip
            raise UsageError(f"--classes: {printable(path)} is not understood: {error}") from error
    if len(given) < 2 or not all(g.name for g in given):
        raise UsageError(
            f"--classes {printable(text)} names fewer than two classes, or an empty one"
        )
    return given


def _from_text(content: str, suffix: str) -> list[Given]:
    if suffix == ".json" or content.lstrip()[:1] in ("[", "{"):
        return _from_json(json.loads(content))
    lines = [line for line in content.splitlines() if line.strip() and line.strip()[0] != "#"]
    first = [cell.strip().lower() for cell in lines[0].split(",")] if lines else []
    if "name" in first:
        return [_from_row(row) for row in csv.DictReader(lines)]
    return [_from_line(line.strip()) for line in lines]


def _from_json(data: Any) -> list[Given]:
    if isinstance(data, dict) and all(str(k).isdigit() for k in data):
        return [Given(str(name), int(value)) for value, name in data.items()]
    if not isinstance(data, list):
        raise ValueError("expected a list of classes")
    given = []
    for entry in data:
        if isinstance(entry, str):
            given.append(Given(entry))
            continue
        value = entry.get("value", entry.get("id"))
        colour = entry.get("colour", entry.get("color"))
        given.append(
            Given(
                str(entry["name"]),
                None if value is None else int(value),
                None if colour is None else _colour(colour),
            )
        )
    return given


def _from_row(row: Mapping[str, str | None]) -> Given:
    cells = {(k or "").strip().lower(): (v or "").strip() for k, v in row.items() if k}
    value = cells.get("value") or cells.get("id")
    colour = [cells.get(k) for k in ("r", "g", "b")]
    return Given(
        cells["name"],
        int(value) if value else None,
        _colour([int(c) for c in colour if c]) if all(colour) else None,
    )


_SEPARATOR = r"[,\s]+"
_RGB = rf"(\d+){_SEPARATOR}(\d+){_SEPARATOR}(\d+)"
_LINES = (
    re.compile(rf"(?:(?P<value>\d+)\s*:\s*)?{_RGB}{_SEPARATOR}(?P<name>\D.*)"),
    re.compile(rf"(?:(?P<value>\d+)\s*[:,\s]\s*)?(?P<name>\D.*?){_SEPARATOR}{_RGB}"),
    re.compile(
        rf"(?:(?P<value>\d+)\s*[:,\s]\s*)?(?P<name>\D.*?)(?:{_SEPARATOR}(?P<hex>#[0-9a-fA-F]{{6}}))?"
    ),
)


def _from_line(line: str) -> Given:
    for pattern in _LINES:
        match = pattern.fullmatch(line)
        if match is None:
            continue
        groups = match.groupdict()
        numbers = [int(g) for k, g in enumerate(match.groups(), 1) if g and g.isdigit()]
        if groups["value"] is not None:
            numbers = numbers[1:]
        colour = groups.get("hex") or (numbers[-3:] if len(numbers) >= 3 else None)
        value = None if groups["value"] is None else int(groups["value"])
        return Given(groups["name"].strip(), value, None if colour is None else _colour(colour))
    raise ValueError(f"line {line!r}")


def _colour(given: Any) -> Colour:
    if isinstance(given, str):
        if not re.fullmatch(r"#?[0-9a-fA-F]{6}", given):
            raise ValueError(f"colour {given!r} is not #rrggbb")
        given = bytes.fromhex(given.removeprefix("#"))
    colour = tuple(int(c) for c in given)
    if len(colour) != 3 or not all(0 <= c <= 255 for c in colour):
        raise ValueError(f"colour {list(colour)} is not three numbers from 0 to 255")
    return colour  # type: ignore[return-value]


def parse_ignore(texts: Sequence[str] | None) -> tuple[int, ...] | None:
    """Values of ``--ignore``: numbers, colours ``#rrggbb``, or ``none``; ``None`` without any.

    Raises:
        UsageError: anything else.
    """
    if not texts:
        return None
    words = [word.strip() for text in texts for word in text.split(",") if word.strip()]
    if words == ["none"]:
        return ()
    values = []
    for word in words:
        if word.startswith("#"):
            try:
                values.append(int(pack_colours(np.array(_colour(word), np.uint8))))
                continue
            except ValueError as error:
                raise UsageError(f"--ignore {word}: {error}") from error
        if not re.fullmatch("[0-9]{1,8}", word) or int(word) >= COLOUR:
            raise UsageError(
                f"--ignore {word!r} is not understood: give numbers (0,255), colours (#000000) or "
                "none"
            )
        values.append(int(word))
    return tuple(values)
