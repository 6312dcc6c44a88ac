"""What was measured, as the rows of tables: for a terminal and as markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fmupsample.bench.run import BACKBONE, BenchReport

COLUMNS = ("upsampler", "ms", "quartiles", "x backbone", "peak MB", "params", "GMACs", "note")
QUALITY = {"miou": "mIoU", "band_miou": "at edges", "boundary_f": "boundary F"}
QUALITY_COLUMNS = (
    "upsampler",
    *(f"{probe}: {title}" for probe in ("preserved", "fitted") for title in QUALITY.values()),
    "note",
)
NOTE = (
    "Times are medians over interleaved rounds, of the whole map from features and picture. Peak "
    "memory is what a call takes, its result included. A multiply-add (MAC) counts once, by "
    "formula, as in published tables."
)


@dataclass(frozen=True)
class Table:
    """Words stand in the first and in the last column, numbers in the others."""

    heading: str
    title: str
    columns: Sequence[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        marks = ["---", *["---:"] * (len(self.columns) - 2), "---"]
        lines = (" | ".join(line) for line in [self.columns, marks, *self.rows])
        drawn = "\n".join(f"| {line} |" for line in lines)
        return f"## {self.heading}\n\n{self.title}:\n\n{drawn}"


def tables(report: BenchReport) -> list[Table]:
    """One for each size that was measured, and one for quality."""
    found = []
    for size in report.settings["sizes"]:
        rows = report.at(size)
        if rows:
            (height, width), (h, w) = rows[0]["pixels"], rows[0]["cells"]
            title = (
                f"{report.settings['channels']} channels, {h}x{w} cells to {height}x{width} "
                f"pixels, one picture, float32"
            )
            found.append(Table(f"{size} px", title, COLUMNS, cost_rows(report, size)))
    quality = report.quality
    if quality is not None:
        title = (
            f"linear probes, short side {quality['image_size']}: fitted on "
            f"{quality['fitted_on']} pictures, judged on {quality['judged_on']}, per cent"
        )
        rows = [_quality_row(row) for row in quality["rows"]]
        found.append(Table("Probe quality", title, QUALITY_COLUMNS, rows))
    return found


def cost_rows(report: BenchReport, size: int) -> list[list[str]]:
    """The rows of one size in :data:`COLUMNS`, the fastest first and the backbone last."""
    rows = report.at(size)
    rows.sort(key=lambda r: (r["upsampler"] == BACKBONE, r["median_s"] is None, r["median_s"]))
    return [_cost_row(row) for row in rows]


def _cost_row(row: dict[str, Any]) -> list[str]:
    times = [row["median_s"], *(row["quartiles_s"] or ())]
    median, *quartiles = ("-" if t is None else milliseconds(t) for t in times)
    return [
        row["upsampler"],
        median,
        " to ".join(quartiles) or "-",
        "-" if row["of_backbone"] is None else f"{row['of_backbone']:.2f}",
        "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
        "-" if row["parameters"] is None else amount(row["parameters"]),
        "-" if row["macs"] is None else f"{row['macs'] / 1e9:.3f}",
        row["reason"] or ("random parameters" if row["weights"] == "random" else ""),
    ]


def _quality_row(row: dict[str, Any]) -> list[str]:
    values = [
        "-" if row[probe] is None or row[probe][key] is None else f"{100 * row[probe][key]:.1f}"
        for probe in ("preserved", "fitted")
        for key in QUALITY
    ]
    return [row["upsampler"], *values, row["reason"] or ""]


def where(report: BenchReport) -> str:
    """Machine and backbone in one line."""
    machine = report.machine
    gpu = (machine.get("gpu") or {}).get("name")
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    place = gpu or f"{machine['cpu']}, {threads}"
    return f"{report.settings['backbone']}, {place}, PyTorch {machine['torch']}"


def markdown(report: BenchReport) -> str:
    """Everything as a page."""
    parts = ["# Upsamplers measured", where(report) + ".", NOTE]
    if not report.complete:
        parts.append("The run was interrupted: what is here had been measured by then.")
    for size, why in report.skipped.items():
        parts.append(f"## {size} px\n\nNot measured: {why}")
    return "\n\n".join([*parts, *(table.markdown() for table in tables(report))]) + "\n"


def milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def amount(count: float) -> str:
    """``0``, ``950``, ``41.2k``, ``2.80M``, ``1.20G``."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g}{unit}"
    return f"{count:.0f}"
