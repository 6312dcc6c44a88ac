"""The progress bar: what the library reports, drawn on standard error."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichBar
from rich.status import Status
from rich.text import Text

from fmupsample.errors import RenamedWarning, one_line

# Everything for people goes through this console; standard output is kept for results.
console = Console(stderr=True, highlight=False)


def note(message: str, *, quiet: bool = False) -> None:
    """One dim line on standard error about what is being done."""
    if not quiet:
        console.print(Text(one_line(message), style="dim"), soft_wrap=True)


def warn(message: str) -> None:
    """One line ``warning: ...`` on standard error."""
    console.print(Text.assemble(("warning: ", "yellow"), one_line(message)), soft_wrap=True)


@contextmanager
def renamings_told() -> Iterator[None]:
    """Say in one line each what was asked for by an earlier name."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, RenamedWarning):
                warn(str(message))
            else:
                others(message, category, *place, **more)

        warnings.showwarning = show
        yield


class BuildLine:
    """The seconds that something takes before the run begins, e.g. compiling; satisfies
    :data:`fmupsample.ops.building.compiling.Progress`.

    ``with BuildLine() as line: work(progress=line)``. On a terminal one line that counts and goes
    away; elsewhere one line for each thing that begins, and nothing when ``quiet``.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._status: Status | None = None
        self._what = ""

    def __enter__(self) -> BuildLine:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def __call__(self, what: str, seconds: float) -> None:
        """``what`` has been going on for ``seconds``."""
        if self.quiet:
            return
        if not console.is_terminal:
            if what != self._what:
                note(f"{what} ...")
        elif self._status is None:
            self._status = console.status(Text(f"{what}: {seconds:.0f} s"))
            self._status.start()
        else:
            self._status.update(Text(f"{what}: {seconds:.0f} s"))
        self._what = what


class _RateColumn(ProgressColumn):
    """Steps per second, e.g. ``3.2 pictures/s``."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        if speed < 0.1:
            return Text(f"{1 / speed:.0f} s per {self.unit.removesuffix('s')}", style="cyan")
        return Text(f"{speed:.1f} {self.unit}/s", style="cyan")


class RichProgress:
    """Draws the stages of a run; satisfies :class:`fmupsample.progress.Progress`.

    ``with RichProgress() as progress: ...``. On a terminal a bar with pictures per second and time
    left; into a file or pipe one plain line every ``interval`` seconds; nothing when ``quiet``
    (warnings are printed all the same).
    """

    def __init__(
        self, *, quiet: bool = False, unit: str = "pictures", interval: float = 15.0
    ) -> None:
        self.quiet = quiet
        self.unit = unit
        self.interval = interval
        self._bar: RichBar | None = None
        self._task = None
        self._label, self._done, self._total = "", 0, 0
        self._began = self._spoke = 0.0

    def __enter__(self) -> RichProgress:
        if not self.quiet and console.is_terminal:
            self._bar = RichBar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                _RateColumn(self.unit),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=console,
            )
            self._bar.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif self._total:
            self._line()
            self._total = 0

    def start(self, total: int, label: str) -> None:
        """Begin a stage; the bar of the stage before stays above it."""
        if self._bar is not None:
            self._task = self._bar.add_task(label, total=total)
        elif self._total:
            self._line()
        self._label, self._done, self._total = label, 0, total
        self._began = self._spoke = time.monotonic()

    def advance(self, steps: int = 1) -> None:
        """``steps`` more are done."""
        self._done += steps
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, steps)
        elif time.monotonic() - self._spoke > self.interval:
            self._line()

    def describe(self, label: str) -> None:
        """Rename the current stage."""
        self._label = label
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=label)

    def warn(self, message: str) -> None:
        """A warning line above the bar."""
        warn(message)

    def _line(self) -> None:
        self._spoke = time.monotonic()
        seconds = self._spoke - self._began
        rate = self._done / seconds if seconds > 0 else 0.0
        note(
            f"{self._label}: {self._done}/{self._total} {self.unit}, {rate:.1f}/s",
            quiet=self.quiet,
        )
