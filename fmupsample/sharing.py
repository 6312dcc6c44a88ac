"""What runs over several processes have in common: messages, pictures in them, progress."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fmupsample.distributed import Team
from fmupsample.errors import FmupsampleError
from fmupsample.images.find import Source
from fmupsample.progress import Progress
from fmupsample.video.frames import from_plain, to_plain

_PATIENCE = 10.0  # seconds for the others to end after Ctrl-C


def share_of(rank: int) -> str:
    """The name of the message with the work of a process."""
    return f"share of {rank}"


def end_of(rank: int) -> str:
    """The name of the message in which a process says that it has done its work."""
    return f"end of {rank}"


def wait_for_share(team: Team) -> None:
    """Until the first process has planned, and found that the run can be done.

    Call it before models are loaded: what the first has downloaded or compiled is there then.
    """
    team.wait(share_of(team.rank))


def refuse_other_options(same: bool, team: Team) -> None:
    """Raise a FmupsampleError unless this process would do ``same`` as the first."""
    if not same:
        raise FmupsampleError(
            f"process {team.rank + 1} of {team.size} has other models or options than the first: "
            "give all the same command and the same files"
        )


def pack_sources(sources: Sequence[Source]) -> dict[str, Any]:
    """Pictures as plain values, for another process."""
    return {
        "folder": os.getcwd(),  # noqa: PTH109 - as text
        "pictures": [to_plain(source) for source in sources],
    }


def unpack_sources(packed: dict[str, Any]) -> list[Source]:
    """The pictures of :func:`pack_sources`, named as the user did where that means the same."""
    folder = Path() if packed["folder"] == os.getcwd() else Path(packed["folder"])  # noqa: PTH109
    return [from_plain(folder, plain) for plain in packed["pictures"]]


def shortly() -> Callable[[], None]:
    """To be called while waiting: raises a TimeoutError once a few seconds are over."""
    last = time.monotonic() + _PATIENCE

    def check() -> None:
        if time.monotonic() > last:
            raise TimeoutError

    return check


class Counting:
    """The progress of a process that is not the first: a number for the first to show."""

    def __init__(self, team: Team) -> None:
        self._team, self._name = team, ""

    def start(self, total: int, label: str) -> None:
        self._name = _finished(label)

    def advance(self, steps: int = 1) -> None:
        self._team.add(self._name, steps)

    def describe(self, label: str) -> None:
        pass

    def warn(self, message: str) -> None:
        pass  # the first hears of it otherwise


class Together:
    """The progress of the first process in one stage, which counts what the others do as its own.

    Args:
        total: steps of the stage, of all processes.
    """

    def __init__(self, progress: Progress, team: Team, total: int) -> None:
        self._progress, self._team, self._total = progress, team, total
        self._name, self._seen = "", 0

    def look(self) -> None:
        """Count what the others have done since."""
        finished = self._team.add(self._name, 0)
        if finished > self._seen:
            self._progress.advance(finished - self._seen)
            self._seen = finished

    def start(self, total: int, label: str) -> None:
        self._name = _finished(label)
        self._progress.start(self._total, f"{label}, {self._team.size} processes")

    def advance(self, steps: int = 1) -> None:
        self._progress.advance(steps)
        self.look()

    def describe(self, label: str) -> None:
        self._progress.describe(label)

    def warn(self, message: str) -> None:
        self._progress.warn(message)


def _finished(label: str) -> str:
    return f"finished: {label}"
