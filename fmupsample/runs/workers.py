"""A run over the processes of ``torchrun``: the first plans and sums up, each does a share.

The first process plans, and leaves the plan in a hidden file of the output folder. Process ``rank``
does every ``size``-th source of it and writes a manifest part of its own; the first merges the
parts at the end. A process that dies leaves its share undone, which the next run does, however many
processes that has. Only the first holds the lock of the folder, renames results, and removes what
killed runs left, all before the others begin.

Word passes through the key-value store that ``torchrun`` keeps for its processes, and not by
collectives: those hold a process where Ctrl-C does not reach it, and give up after minutes, while
one share may take days longer than another.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from fmupsample.distributed import is_distributed
from fmupsample.errors import ProcessError
from fmupsample.progress import Progress

_PATIENCE = 10.0  # seconds for the others to end after Ctrl-C
_joined = 0  # runs of this process: the number is the same in all processes


@contextlib.contextmanager
def joined() -> Iterator[Workers | None]:
    """``with joined() as workers``, in all processes of ``torchrun``; ``None``: this is alone.

    Where the block ends with an error, but for Ctrl-C, the other processes hear of it.

    Raises:
        ProcessError: the others cannot be reached.
    """
    global _joined
    if not is_distributed():
        yield None
        return
    from torch import distributed

    _joined += 1
    try:
        store, rank, size = next(distributed.rendezvous("env://"))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = distributed.PrefixStore(f"fmupsample/{attempt}/{_joined}", store)
    except (RuntimeError, ValueError, OSError) as error:
        raise ProcessError(f"the other processes cannot be reached: {error}") from error
    workers = Workers(store, rank, size)
    try:
        yield workers
    except Exception:
        workers.fail()
        raise


class Workers:
    """The processes of one run.

    Attributes:
        rank, size: the number of this process, and how many there are.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self.rank, self.size = store, rank, size

    @property
    def leads(self) -> bool:
        """Whether this process plans, speaks to the user and sums up."""
        return self.rank == 0

    def post(self, name: str, text: str = "-") -> None:
        """Let the others know."""
        with _reaching():
            self._store.set(name, text)

    def wait(self, name: str, meanwhile: Callable[[], object] = lambda: None) -> str:
        """What has been posted under ``name``; waits for it and calls ``meanwhile`` on the way.

        Raises:
            ProcessError: another process has failed, or the first has gone.
        """
        pause = 0.01
        with _reaching():
            while not self._store.check([name]):
                if self._store.check(["failed"]):
                    number = int(self._store.get("failed")) + 1
                    raise ProcessError(
                        f"process {number} of {self.size} has failed; what is finished is kept, "
                        "and the same command goes on from there"
                    )
                meanwhile()
                time.sleep(pause)
                pause = min(0.3, pause * 1.5)
            return self._store.get(name).decode()

    def wait_for_plan(self) -> None:
        """In a process beside the first: until that has planned, and found the run possible.

        Call it before models are loaded: what the first downloads or compiles is there then.
        """
        self.wait("plan")

    def wait_for_others(self, meanwhile: Callable[[], object]) -> None:
        """In the first process: until each other one has posted its end."""
        for rank in range(1, self.size):
            self.wait(f"end {rank}", meanwhile)

    def fail(self) -> None:
        """Let the others know that this process ends without what they wait for."""
        with contextlib.suppress(RuntimeError):
            self._store.set("failed", str(self.rank))

    def count(self, name: str, steps: int) -> int:
        """Add to a number that all share, and begins at 0; what it is then."""
        with _reaching():
            return self._store.add(name, steps)


@contextlib.contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # DistError and its kin, where the store has gone
        raise ProcessError(
            "the first process has gone; what is finished is kept, and the same command goes on "
            "from there"
        ) from error


def shortly() -> Callable[[], None]:
    """To be called while waiting: raises a TimeoutError once a few seconds are over."""
    last = time.monotonic() + _PATIENCE

    def check() -> None:
        if time.monotonic() > last:
            raise TimeoutError

    return check


class Counting:
    """The progress of a process beside the first: numbers for the first to show."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def start(self, total: int, label: str) -> None:
        pass

    def advance(self, steps: int = 1) -> None:
        self._workers.count("finished", steps)

    def describe(self, label: str) -> None:
        pass

    def warn(self, message: str) -> None:
        pass  # the manifest tells the first


class Together:
    """The progress of the first process, which counts what the others do as its own.

    Args:
        total: steps of all processes.
    """

    def __init__(self, progress: Progress, workers: Workers, total: int) -> None:
        self._progress, self._workers, self._total, self._seen = progress, workers, total, 0

    def look(self) -> None:
        """Count what the others have done since."""
        finished = self._workers.count("finished", 0)
        if finished > self._seen:
            self._progress.advance(finished - self._seen)
            self._seen = finished

    def start(self, total: int, label: str) -> None:
        self._progress.start(self._total, f"{label}, {self._workers.size} processes")

    def advance(self, steps: int = 1) -> None:
        self._progress.advance(steps)
        self.look()

    def describe(self, label: str) -> None:
        self._progress.describe(label)

    def warn(self, message: str) -> None:
        self._progress.warn(message)
