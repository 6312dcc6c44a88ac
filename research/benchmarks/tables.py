"""Cells as tables: the mean over seeds, with the spread, for a terminal or as markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean, stdev

from rich.box import SIMPLE_HEAD
from rich.table import Table

# Key in a cell and its heading, per data set; all are shares, shown in per cent.
COLUMNS = {
    "camvid": {"miou": "mIoU", "band_miou": "at edges", "boundary_f": "boundary F"},
    "davis": {"j": "J", "boundary_f": "boundary F"},
}
TITLES = {"camvid": "CamVid, train -> val", "davis": "DAVIS, first frame -> the rest"}
PROBES = ("preserved", "fitted")


def rows(cells: list[dict], dataset: str, names: list[str]) -> list[list[str]]:
    """Name, a value for each probe and column, and the number of seeds, in the order of ``names``.

    A value is the mean over seeds; with several, plus and minus their standard deviation.
    """
    made = []
    for name in names:
        own = [c for c in cells if c["dataset"] == dataset and c["upsampler"] == name]
        if own:
            values = [
                _value([c[probe][key] for c in own]) for probe in PROBES for key in COLUMNS[dataset]
            ]
            made.append([name, *values, str(len(own))])
    return made


def headings(dataset: str) -> list[str]:
    titles = [f"{probe}: {title}" for probe in PROBES for title in COLUMNS[dataset].values()]
    return ["upsampler", *titles, "seeds"]


def table(cells: list[dict], dataset: str, names: list[str]) -> Table:
    """For a terminal."""
    drawn = Table(title=TITLES[dataset], box=SIMPLE_HEAD, title_justify="left")
    for number, title in enumerate(headings(dataset)):
        # The probe above what is measured: the table fits on 80 columns.
        drawn.add_column(
            title.replace(": ", "\n"), justify="right" if number else "left", no_wrap=not number
        )
    for row in rows(cells, dataset, names):
        drawn.add_row(*row)
    return drawn


def markdown(cells: list[dict], names: list[str]) -> str:
    """Every data set that has cells, one table below another."""
    parts = []
    for dataset, title in TITLES.items():
        found = rows(cells, dataset, names)
        if found:
            parts.append(f"{title}\n\n{markdown_table(headings(dataset), found)}\n")
    return "\n".join(parts)


def _value(numbers: list[float | None]) -> str:
    if any(n is None for n in numbers):
        return "-"
    return with_spread([100 * n for n in numbers])


def with_spread(values: Sequence[float]) -> str:
    """The mean; of several values, plus and minus their standard deviation."""
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table whose first ``words`` columns are words; the others hold numbers and stand right."""
    marks = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, marks, *rows])
