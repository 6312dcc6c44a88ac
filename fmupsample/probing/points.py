"""Clicks as labels: a class for a few pixels of a few pictures, from a JSON file.

    {"classes": ["background", "cat"],
     "points": [{"image": "cat.jpg", "x": 320, "y": 240, "class": "cat"},
                {"image": "cat.jpg", "x": 12.5, "y": 30, "class": "background"}]}

``classes`` may be left out (names in the order in which they occur), and so may the outer object
(the list of points alone). ``image`` is the path below the folder of pictures, or the name; ``x``
to the right and ``y`` down, in pixels of the original picture; ``class`` a name, or its number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fmupsample.errors import UsageError
from fmupsample.images.find import Source, printable
from fmupsample.images.read import read_size
from fmupsample.images.size import Frame
from fmupsample.labels.classes import IGNORE, MOST, ClassTable, class_colours


@dataclass(frozen=True)
class Click:
    """``x`` to the right and ``y`` down, in pixels of the original picture."""

    x: float
    y: float
    number: int  # of the class


def read_clicks(
    path: str | Path, sources: Sequence[Source]
) -> tuple[dict[Source, list[Click]], ClassTable]:
    """The clicks on each picture, and the classes.

    Raises:
        UsageError: unreadable, an unknown picture or class, a point outside its picture, one class
            only. The entry is named.
    """
    path = Path(path)
    shown = printable(path)
    try:
        data = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"the points {shown} cannot be read: {error}") from error
    listed = data.get("points") if isinstance(data, dict) else data
    if not isinstance(listed, list) or not listed:
        raise UsageError(
            f'{shown} holds no points: expected {{"points": [{{"image": "a.jpg", "x": 10, "y": 20, '
            '"class": "cat"}, ...]}'
        )
    names = _names(data, listed, shown)
    index = _by_name(sources)
    sizes: dict[Source, tuple[int, int]] = {}
    clicks: dict[Source, list[Click]] = {}
    for number, entry in enumerate(listed, 1):
        where = f"{shown}, point {number}"
        try:
            image, label = str(entry["image"]), entry["class"]
            x, y = float(entry["x"]), float(entry["y"])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f'{where} is not {{"image", "x", "y", "class"}}: {error!r}') from error
        source = index.get(image)
        if source is None:
            raise UsageError(f"{where}: {printable(image)} is none of the {len(sources)} pictures")
        if source not in sizes:
            sizes[source] = read_size(source.path)
        height, width = sizes[source]
        if not (0 <= x <= width and 0 <= y <= height):
            raise UsageError(
                f"{where}: x {x:g}, y {y:g} lies outside of {source}, which has {width}x{height} "
                "pixels"
            )
        clicks.setdefault(source, []).append(Click(x, y, _number(label, names, where)))
    used = {click.number for own in clicks.values() for click in own}
    if len(used) < 2:
        raise UsageError(f"{shown} has points of one class only: click on the others too")
    return clicks, ClassTable(tuple(names), tuple(range(len(names))), class_colours(names))


def _names(data: Any, listed: list[Any], shown: str) -> list[str]:
    given = data.get("classes") if isinstance(data, dict) else None
    if given is not None:
        if not isinstance(given, list):
            raise UsageError(f'{shown}: "classes" must be a list of names, not {given!r}')
        names = [c.get("name") if isinstance(c, dict) else c for c in given]
        if len(set(map(str, names))) != len(names) or not all(isinstance(n, str) for n in names):
            raise UsageError(f"{shown}: classes must be different names, not {names}")
        return names
    labels = [e.get("class") for e in listed if isinstance(e, dict)]
    if labels and all(isinstance(v, int) for v in labels):
        if max(labels) >= MOST:
            raise UsageError(f"{shown}: class {max(labels)} is too large: there can be {MOST}")
        return [str(n) for n in range(max(labels) + 1)]
    return list(dict.fromkeys(str(v) for v in labels))


def _number(label: Any, names: list[str], where: str) -> int:
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
        return label
    if str(label) in names:
        return names.index(str(label))
    raise UsageError(f"{where}: class {label!r} is none of {', '.join(names[:8])}")


def _by_name(sources: Sequence[Source]) -> dict[str, Source]:
    """By every name that means one picture alone: its path, relative path, or file name."""
    found: dict[str, list[Source]] = {}
    for source in sources:
        for name in {str(source.path), str(source.relative), source.relative.name}:
            found.setdefault(name, []).append(source)
    return {name: own[0] for name, own in found.items() if len(own) == 1}


def click_labels(clicks: Sequence[Click], frame: Frame, radius: float) -> np.ndarray:
    """Class numbers at the size of the picture on the canvas, uint8 ``[H, W]``.

    A disc around each click, where two overlap the nearer; elsewhere :data:`IGNORE`.
    """
    height, width = frame.placed
    rows, columns = np.mgrid[:height, :width] + 0.5
    labels = np.full((height, width), IGNORE, np.uint8)
    nearest = np.full((height, width), math.inf)
    for click in clicks:
        x, y = frame.to_canvas((click.x, click.y))
        # At least the pixel that was clicked.
        x, y = min(x, width - 0.5), min(y, height - 0.5)
        distance = np.hypot(columns - x, rows - y)
        inside = (distance <= max(radius, 0.75)) & (distance < nearest)
        labels[inside] = click.number
        nearest[inside] = distance[inside]
    return labels
