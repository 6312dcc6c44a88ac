"""The bench as a picture: a row for each method, a panel for each number, a dot for each size."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from fmupsample.bench.run import BACKBONE, BenchReport
from fmupsample.bench.tables import where
from fmupsample.errors import UsageError


@dataclass
class _Panel:
    """Numbers of each series by method; ``spans`` are quartiles."""

    title: str
    unit: str
    series: dict[str, dict[str, float]]
    spans: dict[str, dict[str, tuple[float, float]]]
    logarithmic: bool = True


def draw(report: BenchReport) -> bytes | None:
    """A PNG; ``None`` where nothing was measured.

    Raises:
        UsageError: matplotlib is not installed.
    """
    panels = [panel for panel in _panels(report) if any(panel.series.values())]
    if not panels:
        return None
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("charts need matplotlib: pip install 'fmupsample[plot]'") from None
    names = _order(report)
    with mpl.rc_context():
        mpl.rcdefaults()  # settings of the current folder do not count
        figure = Figure((3 + 2.6 * len(panels), 1.8 + 0.28 * len(names)), layout="constrained")
        figure.suptitle(f"Upsamplers on this machine\n{_note(report)}", fontsize=10)
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for ax, panel in zip(axes, panels, strict=True):
            _draw_panel(ax, panel, names)
        axes[0].set_yticks(range(len(names)), _labels(report, names))
        axes[0].invert_yaxis()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _draw_panel(ax, panel: _Panel, names: Sequence[str]) -> None:
    from matplotlib.ticker import EngFormatter, NullFormatter

    for series, values in panel.series.items():
        rows = [names.index(name) for name in values]
        (dots,) = ax.plot(list(values.values()), rows, "o", markersize=5, label=series)
        for name, span in panel.spans.get(series, {}).items():
            ax.plot(span, [names.index(name)] * 2, color=dots.get_color())
    ax.set_title(panel.title, fontsize=9)
    if panel.logarithmic:
        above = [v for values in panel.series.values() for v in values.values() if v > 0]
        # Zero, which some methods cost, has a place left of the least number.
        ax.set_xscale("symlog", linthresh=min(above, default=1), linscale=0.3)
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_formatter(EngFormatter(panel.unit, sep=" " if panel.unit else ""))
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.3)
    if len(panel.series) > 1:
        ax.legend(fontsize=7)


def _panels(report: BenchReport) -> list[_Panel]:
    at = {f"{size} px": report.at(size) for size in report.settings["sizes"]}

    def values(rows: list[dict], key: str) -> dict:
        return {row["upsampler"]: row[key] for row in rows if row[key] is not None}

    def by_size(key: str) -> dict[str, dict]:
        return {size: values(rows, key) for size, rows in at.items()}

    panels = [
        _Panel("time of a map", "s", by_size("median_s"), by_size("quartiles_s")),
        _Panel("peak memory", "B", by_size("peak_bytes"), {}),
        _Panel("multiply-adds", "", by_size("macs"), {}),
        _Panel("parameters", "", {"": values(report.rows, "parameters")}, {}),
    ]
    if report.quality is not None:
        found = {
            f"{probe} probe": {
                row["upsampler"]: 100 * row[probe]["miou"]
                for row in report.quality["rows"]
                if row[probe] is not None and row[probe]["miou"] is not None
            }
            for probe in ("preserved", "fitted")
        }
        panels.append(_Panel("mIoU, per cent", "", found, {}, logarithmic=False))
    return panels


def _order(report: BenchReport) -> list[str]:
    """The fastest first, by the largest size at which a method was timed; the backbone last."""
    best: dict[str, tuple] = {}
    for row in report.rows:
        rank = (row["median_s"] is None, -row["size"], row["median_s"] or 0)
        best[row["upsampler"]] = min(rank, best.get(row["upsampler"], rank))
    return sorted(best, key=lambda name: (name == BACKBONE, *best[name]))


def _labels(report: BenchReport, names: Sequence[str]) -> list[str]:
    """Names with a star for random parameters, and why one was not measured."""
    rows = {row["upsampler"]: row for row in report.rows}
    labels = []
    for name in names:
        why = rows[name]["reason"] if rows[name]["median_s"] is None else None
        star = " *" if rows[name]["weights"] == "random" else ""
        labels.append(f"{name}{star}" + (f"\n{why[:40]}" if why else ""))
    return labels


def _note(report: BenchReport) -> str:
    parts = [where(report), f"{report.settings['channels']} channels, one picture, medians"]
    if any(row["weights"] == "random" for row in report.rows):
        parts.append("* random parameters")
    if not report.complete:
        parts.append("interrupted")
    return "; ".join(parts)
