"""The growth of time with pixels and with channels, as a picture."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

BASE = {"size": 448, "channels": 384, "ratio": 14, "batch": 1}
# Of each case its name in the legend and its colour; colour-blind readers can tell them apart.
LINES = {
    "whole head": ("ReSFU, whole", "#0072b2"),
    "reassembly": ("its reassembly", "#d55e00"),
    "masks": ("21 masks, value first", "#009e73"),
    "bilinear": ("F.interpolate", "#cc79a7"),
    "copy": ("copy of the output", "#a0a0a8"),
    "backbone": ("backbone", "#5a5a62"),
}
AXES = {
    "size": ("Time of a picture, 384 channels", "side of the picture, pixels (area to scale)", 2),
    "channels": ("Time of a picture, 448 px", "channels", 1),
}


def growth(results: list[dict], dtype: str, machine: dict) -> Figure | None:
    """Time against pixels and against channels, from the results of a sweep.

    ``None`` where no two settings differ in one of them alone.
    """
    chosen = {axis: _varied(results, axis) for axis in AXES}
    chosen = {axis: found for axis, found in chosen.items() if len(found) > 1}
    if not chosen:
        return None
    where = (machine.get("gpu") or {}).get("name")
    where = where or f"{machine['cpu']}, {machine['threads']} threads"
    figure = Figure((6 * len(chosen), 4.5), layout="constrained")
    figure.suptitle(
        "Growth with pixels and with channels\n"
        f"{where}, PyTorch {machine['torch']}, {dtype}, ratio 14, medians",
        fontsize=10,
    )
    panels = figure.subplots(1, len(chosen), squeeze=False)[0]
    for panel, (axis, found) in zip(panels, chosen.items(), strict=True):
        _draw(panel, axis, found, dtype)
    shown = {line.get_label(): line for panel in panels for line in panel.lines}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=3)
    return figure


def _varied(results: list[dict], axis: str) -> dict[int, dict]:
    """The cases by the value of ``axis``, everything else being as in ``BASE``."""
    others = {key: value for key, value in BASE.items() if key != axis}
    return {
        r["setting"][axis]: r["cases"]
        for r in sorted(results, key=lambda r: r["setting"][axis])
        if all(r["setting"][key] == value for key, value in others.items())
    }


def _draw(panel, axis: str, found: dict[int, dict], dtype: str) -> None:
    title, label, power = AXES[axis]
    for case, (name, colour) in LINES.items():
        points = {
            value**power: cases[f"{case} {dtype}"]["median_s"]
            for value, cases in found.items()
            if f"{case} {dtype}" in cases
        }
        if points:
            panel.loglog(points.keys(), points.values(), "o-", color=colour, label=name)
    panel.set_title(title, fontsize=10)
    panel.set_xlabel(label)
    panel.set_xticks([value**power for value in found], [str(value) for value in found])
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(EngFormatter("s"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.grid(alpha=0.3)
