"""The growth of time with pixels and with channels, as a picture. Pillow draws it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from PIL import Image

from fmupsample.render.plot import AXIS, COLOURS, GREYS, GRID, Draw, blank, finished, seconds
from fmupsample.render.text import FAINT, INK, text_width

WIDTH, HEIGHT = 470, 330  # of a panel's frame
LEFT, GAP, RIGHT, TOP, BOTTOM = 74, 84, 28, 122, 66


@dataclass
class Panel:
    """One pair of logarithmic axes; ``series`` maps a name to ``(x, seconds)`` points."""

    title: str
    x_label: str
    series: dict[str, list[tuple[float, float]]]
    x_ticks: dict[float, str]
    bounds: tuple[float, float, float, float] = field(init=False)  # decades: x0, x1, y0, y1

    def __post_init__(self) -> None:
        points = [point for line in self.series.values() for point in line]
        xs = [math.log10(x) for x, _ in points] + [math.log10(x) for x in self.x_ticks]
        ys = [math.log10(y) for _, y in points]
        margin = max(0.06 * (max(xs) - min(xs)), 0.02)
        marks = [mark for mark, _ in _marks(math.floor(min(ys)) - 1, math.ceil(max(ys)) + 1)]
        y0 = max(mark for mark in marks if mark <= min(ys) - 0.05)
        y1 = min(mark for mark in marks if mark >= max(ys) + 0.05)
        self.bounds = (min(xs) - margin, max(xs) + margin, y0, y1)


def _marks(low: int, high: int) -> list[tuple[float, float]]:
    """``(logarithm, seconds)`` of 1, 2 and 5 in the decades from ``low`` to ``high``."""
    values = [part * 10.0**decade for decade in range(low, high + 1) for part in (1, 2, 5)]
    return [(math.log10(value), value) for value in values]


def chart(title: str, note: str, panels: list[Panel], colours: dict[str, tuple]) -> Image.Image:
    """Panels side by side under one legend; ``colours`` gives the names' order and colours."""
    width = LEFT + len(panels) * WIDTH + (len(panels) - 1) * GAP + RIGHT
    height = TOP + HEIGHT + BOTTOM
    canvas = blank(width, height)
    draw = Draw(canvas)
    draw.text((LEFT, 16), title, 19, INK)
    draw.text((LEFT, 43), note, 13, FAINT)
    shown = [name for name in colours if any(name in panel.series for panel in panels)]
    x = LEFT
    for name in shown:
        draw.line([(x, 78), (x + 22, 78)], colours[name], 2.4)
        draw.dot((x + 11, 78), colours[name])
        draw.text((x + 29, 70), name, 13, INK)
        x += 29 + text_width(name, 13) + 24
    for number, panel in enumerate(panels):
        _panel(draw, panel, LEFT + number * (WIDTH + GAP), colours)
    return finished(canvas)


def _panel(draw: Draw, panel: Panel, left: int, colours: dict[str, tuple]) -> None:
    x0, x1, y0, y1 = panel.bounds

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - x0) / (x1 - x0)
        up = (math.log10(y) - y0) / (y1 - y0)
        return left + across * WIDTH, TOP + (1 - up) * HEIGHT

    bottom, right = TOP + HEIGHT, left + WIDTH
    marks = [m for m in _marks(math.floor(y0), math.ceil(y1)) if y0 - 1e-9 <= m[0] <= y1 + 1e-9]
    for log, value in marks:
        whole = abs(log - round(log)) < 1e-9
        y = place(10**x0, value)[1]
        draw.line([(left, y), (right, y)], GRID, 1.2 if whole else 0.5)
        if whole or len(marks) < 10:
            draw.text((left - 8, y - 8), seconds(value), 12, FAINT, anchor="right")
    for x, label in panel.x_ticks.items():
        at = place(x, 10.0**y0)[0]
        draw.line([(at, TOP), (at, bottom)], GRID, 0.7)
        draw.line([(at, bottom), (at, bottom + 4)], AXIS, 1)
        draw.text((at, bottom + 7), label, 12, FAINT, anchor="middle")
    draw.line([(left, TOP), (left, bottom), (right, bottom)], AXIS, 1)
    draw.text((left, TOP - 24), panel.title, 14, INK)
    draw.text((left + WIDTH / 2, bottom + 30), panel.x_label, 13, INK, anchor="middle")
    for name, colour in colours.items():
        points = [place(*point) for point in sorted(panel.series.get(name, []))]
        draw.line(points, colour, 2.4)
        for point in points:
            draw.dot(point, colour)


def growth(results: list[dict], dtype: str, machine: dict) -> Image.Image | None:
    """Time against pixels and against channels, from the results of a sweep.

    ``None`` where no two settings differ in one of them alone.
    """
    names = {
        "whole head": COLOURS[0],
        "reassembly": COLOURS[1],
        "masks": COLOURS[2],
        "bilinear": COLOURS[3],
        "copy": GREYS[1],
        "backbone": GREYS[0],
    }
    legend = {
        "whole head": "ReSFU, whole",
        "reassembly": "its reassembly",
        "masks": "21 masks, value first",
        "bilinear": "F.interpolate",
        "copy": "copy of the output",
        "backbone": f"backbone {dtype}",
    }
    base = {"size": 448, "channels": 384, "ratio": 14, "batch": 1}

    def series(axis: str, x: float) -> dict[str, list[tuple[float, float]]]:
        lines: dict[str, list[tuple[float, float]]] = {}
        for result in results:
            setting = result["setting"]
            if any(setting[key] != base[key] for key in base if key != axis):
                continue
            for name in names:
                case = result["cases"].get(f"{name} {dtype}")
                if case:
                    point = (setting[axis] ** x, case["median_s"])
                    lines.setdefault(legend[name], []).append(point)
        return lines

    panels = []
    for axis, power, title, label in (
        ("size", 2, "384 channels", "side of the picture, pixels (area to scale)"),
        ("channels", 1, "448 px", "channels"),
    ):
        lines = series(axis, power)
        xs = sorted({x for line in lines.values() for x, _ in line})
        if len(xs) > 1:
            ticks = {x: f"{round(x ** (1 / power))}" for x in xs}
            panels.append(Panel(f"Time of a picture, {title}", label, lines, ticks))
    if not panels:
        return None
    where = (machine.get("gpu") or {}).get(
        "name"
    ) or f"{machine['cpu']}, {machine['threads']} threads"
    title = "Growth with pixels and with channels"
    note = f"{where}, PyTorch {machine['torch']}, {dtype}, ratio 14, medians"
    return chart(title, note, panels, {legend[name]: colour for name, colour in names.items()})
