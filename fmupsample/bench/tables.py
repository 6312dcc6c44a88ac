"""What was measured, as the rows of tables: for a terminal and as markdown."""

from __future__ import annotations

from typing import Any

from fmupsample.bench.run import BACKBONE, BenchReport

COLUMNS = ("upsampler", "ms", "quartiles", "x backbone", "peak MB", "params", "GMACs", "note")
QUALITY = {"miou": "mIoU", "band_miou": "at edges", "boundary_f": "boundary F"}
QUALITY_COLUMNS = (
    "upsampler",
    *(f"{probe}: {title}" for probe in ("preserved", "fitted") for title in QUALITY.values()),
    "note",
)


def cost_rows(report: BenchReport, size: int) -> list[list[str]]:
    """The rows of one size in :data:`COLUMNS`, the fastest first and the backbone last."""
    rows = report.at(size)
    rows.sort(key=lambda r: (r["upsampler"] == BACKBONE, r["median_s"] is None, r["median_s"]))
    return [_cost_row(row) for row in rows]


def _cost_row(row: dict[str, Any]) -> list[str]:
    median, quartiles = row["median_s"], row["quartiles_s"]
    note = row["reason"] or ("random parameters" if row["weights"] == "random" else "")
    return [
        row["upsampler"],
        "-" if median is None else milliseconds(median),
        "-" if median is None else " to ".join(milliseconds(q) for q in quartiles),
        "-" if row["of_backbone"] is None else f"{row['of_backbone']:.2f}",
        "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
        "-" if row["parameters"] is None else amount(row["parameters"]),
        "-" if row["macs"] is None else f"{row['macs'] / 1e9:.3f}",
        note,
    ]


def quality_rows(report: BenchReport) -> list[list[str]]:
    """In :data:`QUALITY_COLUMNS`, per cent."""
    made = []
    for row in (report.quality or {"rows": []})["rows"]:
        values = [
            "-" if row[probe] is None or row[probe][key] is None else f"{100 * row[probe][key]:.1f}"
            for probe in ("preserved", "fitted")
            for key in QUALITY
        ]
        made.append([row["upsampler"], *values, row["reason"] or ""])
    return made


def title(report: BenchReport, size: int) -> str:
    """Of the table of one size."""
    rows = report.at(size)
    (height, width), (h, w) = rows[0]["pixels"], rows[0]["cells"]
    return (
        f"{report.settings['channels']} channels, {h}x{w} cells to {height}x{width} pixels, "
        f"one picture, float32"
    )


def quality_title(report: BenchReport) -> str:
    assert report.quality is not None
    return (
        f"linear probes, short side {report.quality['image_size']}: fitted on "
        f"{report.quality['fitted_on']} pictures, judged on {report.quality['judged_on']}, per cent"
    )


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
    for size in report.settings["sizes"]:
        if str(size) in report.skipped:
            parts.append(f"## {size} px\n\nNot measured: {report.skipped[str(size)]}")
        elif report.at(size):
            drawn = _table(COLUMNS, cost_rows(report, size))
            parts.append(f"## {size} px\n\n{title(report, size)}:\n\n{drawn}")
    if report.quality is not None:
        drawn = _table(QUALITY_COLUMNS, quality_rows(report))
        parts.append(f"## Probe quality\n\n{quality_title(report)}:\n\n{drawn}")
    return "\n\n".join(parts) + "\n"


NOTE = (
    "Times are medians over interleaved rounds, of the whole map from features and picture. Peak "
    "memory is what a call takes, its result included. A multiply-add (MAC) counts once, by "
    "formula, as in published tables."
)


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    # What is said in words stands left, numbers right.
    marks = ["---" if c in ("upsampler", "note") else "---:" for c in columns]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(columns), marks, *rows])


def milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def amount(count: float) -> str:
    """``0``, ``950``, ``41.2k``, ``2.80M``, ``1.20G``."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g}{unit}"
    return f"{count:.0f}"
