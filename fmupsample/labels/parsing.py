"""What people write about classes: ``--classes`` and ``--ignore``."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fmupsample.errors import UsageError
from fmupsample.images.find import printable
from fmupsample.labels.classes import COLOUR, Colour, pack_colours, parse_colour


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
    if is_file:
        given = _from_file(path)
    elif path.suffix.lower() in (".json", ".csv", ".txt"):
        raise UsageError(f"--classes: the file {printable(path)} does not exist")
    else:
        given = [Given(name.strip()) for name in text.split(",")]
    if len(given) < 2 or not all(g.name for g in given):
        raise UsageError(
            f"--classes {printable(text)} names fewer than two classes, or an empty one"
        )
    return given


def _from_file(path: Path) -> list[Given]:
    try:
        content = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--classes: {printable(path)} cannot be read: {error}") from error
    try:
        if path.suffix.lower() == ".json" or content.lstrip()[:1] in ("[", "{"):
            return _from_json(json.loads(content))
        lines = [line.strip() for line in content.splitlines()]
        lines = [line for line in lines if line and line[0] != "#"]
        if lines and "name" in [cell.strip().lower() for cell in lines[0].split(",")]:
            return [_from_row(row) for row in csv.DictReader(lines)]
        return [_from_line(line) for line in lines]
    except (
        ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, csv.Error,
    ) as error:  # fmt: skip
        raise UsageError(f"--classes: {printable(path)} is not understood: {error}") from error


def _given(name: Any, value: Any, colour: Any) -> Given:
    return Given(
        str(name),
        None if value is None else int(value),
        None if colour is None else parse_colour(colour),
    )


def _from_json(data: Any) -> list[Given]:
    if isinstance(data, dict) and all(str(k).isdigit() for k in data):
        return [_given(name, value, None) for value, name in data.items()]
    if not isinstance(data, list):
        raise ValueError("expected a list of classes")
    rows = [{"name": entry} if isinstance(entry, str) else entry for entry in data]
    return [
        _given(row["name"], row.get("value", row.get("id")), row.get("colour", row.get("color")))
        for row in rows
    ]


def _from_row(row: Mapping[str, str | None]) -> Given:
    cells = {(k or "").strip().lower(): (v or "").strip() for k, v in row.items() if k}
    colour = [cells.get(k) for k in ("r", "g", "b")]
    value = cells.get("value") or cells.get("id") or None
    return _given(cells["name"], value, colour if all(colour) else None)


_RGB = r"\d+[,\s]+\d+[,\s]+\d+"
_LINE = re.compile(
    rf"(?:(?P<value>\d+)\s*[:,\s]\s*)?(?:(?P<before>{_RGB})[,\s]+)?(?P<name>\D.*?)"
    rf"(?:[,\s]+(?P<after>{_RGB}|#[0-9a-fA-F]{{6}}))?"
)


def _from_line(line: str) -> Given:
    match = _LINE.fullmatch(line)
    if match is None:
        raise ValueError(f"line {line!r}")
    colour = match["before"] or match["after"]
    if colour and colour[0] != "#":
        colour = re.findall(r"\d+", colour)
    return _given(match["name"].strip(), match["value"], colour or None)


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
                values.append(int(pack_colours(np.array(parse_colour(word), np.uint8))))
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
