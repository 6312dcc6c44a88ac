"""What a command prints when it is done: a table for people, JSON for programs, both on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fmupsample.errors import one_line


def print_summary(
    title: str,
    rows: Mapping[str, str | int | float],
    *,
    as_json: bool,
    payload: dict[str, Any],
) -> None:
    """End a command: ``rows`` as a two-column table under ``title``, or ``payload`` as JSON."""
    if as_json:
        print_json(payload)
        return
    table = Table(
        title=Text(one_line(title)), title_justify="left", box=box.SIMPLE, show_header=False
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(key, Text(_text(value)))
    _print(table)


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str | int | float]],
    *,
    title: str | None = None,
    right: Sequence[str] = (),
) -> None:
    """A table of several columns; those named in ``right`` are right-aligned."""
    table = Table(
        title=Text(one_line(title)) if title else None, title_justify="left", box=box.SIMPLE
    )
    for place, column in enumerate(columns):
        table.add_column(
            column,
            justify="right" if column in right else "left",
            overflow="fold",
            no_wrap=place == 0,  # what a row is about stays in one piece
        )
    for row in rows:
        table.add_row(*(Text(_text(value)) for value in row))
    _print(table)


def print_json(payload: Any) -> None:
    """``payload`` as indented JSON on standard output; numbers JSON cannot hold become null."""
    text = json_text(payload)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    # JSON has escapes of its own for characters that the encoding lacks.
    print(text if encoding.lower().startswith("utf") else json.dumps(json.loads(text), indent=2))


def json_text(payload: Any) -> str:
    """The same as text."""
    return json.dumps(_finite(payload), indent=2, ensure_ascii=False, default=str)


def save_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write ``files`` into ``folder``, which is made, each whole or not at all.

    Raises:
        OutputError: that is not possible.
    """
    from fmupsample.atomic import replacing
    from fmupsample.errors import OutputError
    from fmupsample.images import printable

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            with replacing(folder / name) as temporary:
                temporary.write_bytes(data)
    except OSError as error:
        raise OutputError(f"{printable(folder)} cannot be written: {error.strerror}") from error


def is_narrow(columns: int) -> bool:
    """Whether standard output is a terminal of fewer than ``columns`` characters."""
    console = Console()
    return console.is_terminal and console.width < columns


def _print(table: Table) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        # A pipe has no width: never fold what a program or a log will read.
        console = Console(highlight=False, width=240)
    console.print(table)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10000 else str(value)
    return one_line(str(value))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
