"""The bench as a picture: a row for each method, a panel for each number, a dot for each size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from fmupsample.bench.run import BACKBONE, BenchReport
from fmupsample.bench.tables import amount, where
from fmupsample.render.plot import AXIS, COLOURS, GREYS, GRID, Draw, blank, finished
from fmupsample.render.text import FAINT, INK, fit, text_width

ROW, PANEL, GAP, TOP, BOTTOM, RIGHT = 24, 196, 26, 132, 58, 28
_MOST_TICKS = 5
_LEAST_GAP = 0.2  # between marks, as a share of the axis: their numbers do not touch


@dataclass
class _Series:
    """Dots of one colour, by the method's name; ``spans`` are the quartiles."""

    name: str
    colour: tuple
    values: dict[str, float]
    spans: dict[str, tuple[float, float]]


@dataclass
class _Panel:
    title: str
    series: list[_Series]
    text: Callable[[float], str]
    logarithmic: bool = True


def draw(report: BenchReport) -> Image.Image | None:
    """``None`` where nothing was measured."""
    sizes = [size for size in report.settings["sizes"] if report.at(size)]
    names = _order(report, sizes)
    panels = _panels(report, sizes)
    if not panels or not names:
        return None
    last = {row["upsampler"]: row for size in sizes for row in report.at(size)}
    marked = {n: n + (" *" if last[n]["weights"] == "random" else "") for n in names}
    left = 40 + max(text_width(label, 13) for label in marked.values())
    width = left + len(panels) * PANEL + (len(panels) - 1) * GAP + RIGHT
    height = TOP + ROW * len(names) + BOTTOM
    canvas = blank(width, height)
    pen = Draw(canvas)
    pen.text((24, 16), "Upsamplers on this machine", 19, INK)
    pen.text((24, 43), fit(_note(report, marked), 13, width - 48), 13, FAINT)
    _legend(pen, panels)
    for number, name in enumerate(names):
        y = _row(number)
        pen.text((left - 14, y - 9), marked[name], 13, INK, anchor="right")
    for number, panel in enumerate(panels):
        x = left + number * (PANEL + GAP)
        _draw_panel(pen, panel, x, names)
    timed = {r["upsampler"] for r in report.rows if r["median_s"] is not None}
    for name in names:
        if name not in timed:
            why = fit(last[name]["reason"] or "", 11, PANEL - 8)
            pen.text((left + 6, _row(names.index(name)) - 7), why, 11, FAINT)
    return finished(canvas)


def _note(report: BenchReport, marked: dict[str, str]) -> str:
    parts = [where(report), f"{report.settings['channels']} channels, one picture, medians"]
    if any(label.endswith("*") for label in marked.values()):
        parts.append("* random parameters")
    if not report.complete:
        parts.append("interrupted")
    return "; ".join(parts)


def _order(report: BenchReport, sizes: Sequence[int]) -> list[str]:
    """The fastest first, by the largest size at which a method was timed; the backbone last."""
    best: dict[str, tuple] = {}
    for size in sizes:
        for row in report.at(size):
            if row["median_s"] is not None or row["upsampler"] not in best:
                missing = row["median_s"] is None
                best[row["upsampler"]] = (missing, -size, row["median_s"] or 0)
    return sorted(best, key=lambda name: (name == BACKBONE, *best[name]))


def _panels(report: BenchReport, sizes: Sequence[int]) -> list[_Panel]:
    colours = dict(zip(sizes, COLOURS * len(sizes), strict=False))

    def by_size(key: str) -> list[_Series]:
        made = []
        for size in sizes:
            rows = {row["upsampler"]: row for row in report.at(size)}
            values = {name: row[key] for name, row in rows.items() if row[key] is not None}
            spans = {}
            if key == "median_s":
                spans = {name: tuple(rows[name]["quartiles_s"]) for name in values}
            made.append(_Series(f"{size} px", colours[size], values, spans))
        return made

    panels = [
        _Panel("time of a map", by_size("median_s"), _seconds),
        _Panel("peak memory", by_size("peak_bytes"), _bytes),
        _Panel("multiply-adds", by_size("macs"), amount),
        _Panel("parameters", [_parameters(report, sizes)], amount),
    ]
    if report.quality is not None:
        panels.append(_Panel("mIoU, per cent", _quality(report), lambda v: f"{v:g}", False))
    return [panel for panel in panels if any(series.values for series in panel.series)]


def _parameters(report: BenchReport, sizes: Sequence[int]) -> _Series:
    rows = [row for size in sizes for row in report.at(size)]
    values = {r["upsampler"]: r["parameters"] for r in rows if r["parameters"] is not None}
    return _Series("", GREYS[0], values, {})


def _quality(report: BenchReport) -> list[_Series]:
    assert report.quality is not None
    made = []
    for probe, colour in (("preserved", COLOURS[2]), ("fitted", COLOURS[3])):
        values: dict[str, float] = {}
        for row in report.quality["rows"]:
            if row[probe] is not None and row[probe]["miou"] is not None:
                values[row["upsampler"]] = 100 * row[probe]["miou"]
        made.append(_Series(f"{probe} probe", colour, values, {}))
    return made


def _legend(pen: Draw, panels: Sequence[_Panel]) -> None:
    shown = {s.name: s.colour for panel in panels for s in panel.series if s.name and s.values}
    x = 24.0
    for name, colour in shown.items():
        pen.dot((x + 5, 84), colour, 5)
        pen.text((x + 15, 76), name, 13, INK)
        x += 15 + text_width(name, 13) + 22


def _row(number: int) -> float:
    return TOP + ROW * (number + 0.5)


def _draw_panel(pen: Draw, panel: _Panel, left: float, names: Sequence[str]) -> None:
    numbers = [v for s in panel.series for v in s.values.values()]
    ends = [v for s in panel.series for span in s.spans.values() for v in span]
    low, high, ticks = _scale([*numbers, *ends], panel.logarithmic)
    bottom, right = TOP + ROW * len(names), left + PANEL
    zero = panel.logarithmic and min(numbers) <= 0
    start = left + (26 if zero else 8)  # zeros stand left of a logarithmic axis

    def place(value: float) -> float:
        if panel.logarithmic:
            if value <= 0:
                return left + 8
            value = math.log10(value)
        return start + (value - low) / (high - low) * (right - 8 - start)

    pen.text((left, TOP - 26), panel.title, 13, INK)
    for number in range(len(names)):
        y = _row(number)
        pen.line([(left, y), (right, y)], GRID, 0.6)
    for tick in ticks:
        x = place(tick)
        pen.line([(x, TOP), (x, bottom)], GRID, 1)
        pen.line([(x, bottom), (x, bottom + 4)], AXIS, 1)
        pen.text((x, bottom + 7), panel.text(tick), 11, FAINT, anchor="middle")
    if zero:
        pen.line([(left + 8, bottom), (left + 8, bottom + 4)], AXIS, 1)
        pen.text((left + 8, bottom + 7), "0", 11, FAINT, anchor="middle")
    pen.line([(left, bottom), (right, bottom)], AXIS, 1)
    for series in panel.series:
        for name, value in series.values.items():
            y = _row(names.index(name))
            if name in series.spans:
                pen.line([(place(v), y) for v in series.spans[name]], series.colour, 2)
            pen.dot((place(value), y), series.colour, 5)


def _scale(values: Sequence[float], logarithmic: bool) -> tuple[float, float, list[float]]:
    """Ends of the axis (of the logarithms, where it is logarithmic), and where its marks are."""
    if logarithmic:
        logs = [math.log10(v) for v in values if v > 0] or [0.0]
        low, high = min(logs), max(logs)
        pad = max(0.04 * (high - low), 0.05)
        low, high = low - pad, high + pad
        decades = range(math.floor(low), math.ceil(high) + 1)
        for parts, closest in (((1, 2, 5), 0.3), ((1, 3), 0.47), ((1,), 1.0)):
            ticks = [p * 10.0**d for d in decades for p in parts]
            ticks = [t for t in ticks if low <= math.log10(t) <= high]
            if len(ticks) <= _MOST_TICKS and closest / (high - low) > _LEAST_GAP:
                break
        return low, high, ticks[:: math.ceil(len(ticks) / _MOST_TICKS)] if ticks else []
    low, high = min(values), max(values)
    pad = max(0.08 * (high - low), 0.5)
    low, high = low - pad, high + pad
    step = next(s for s in (0.2, 0.5, 1, 2, 5, 10, 20, 50) if (high - low) / s <= _MOST_TICKS)
    first = math.ceil(low / step)
    return low, high, [step * n for n in range(first, math.floor(high / step) + 1)]


def _bytes(value: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value / 1e3:.3g} kB"


def _seconds(value: float) -> str:
    for unit, factor in (("s", 1), ("ms", 1e3)):
        if value * factor >= 0.999:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} us"
