"""A run over several processes: the first plans and sums up, and each does a share of the pictures.

The share is fixed at the beginning, every n-th picture; a process that dies leaves its own undone,
which the next run does, however many processes that has. Only the first holds the lock of the
folder, moves, and removes what killed runs left, all before the others begin.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from fmupsample.distributed import Team
from fmupsample.errors import FmupsampleError, OutputError
from fmupsample.extraction.plan import Plan, Task
from fmupsample.images import printable, storable
from fmupsample.progress import Progress
from fmupsample.video.frames import from_plain, to_plain
from fmupsample.writers.manifest import Manifest, ManifestPart

if TYPE_CHECKING:
    from fmupsample.extraction.run import Run

_FINISHED = "pictures finished"
_PATIENCE = 10.0  # seconds for the others to end after Ctrl-C


def wait_for_share(team: Team) -> None:
    """Until the first process has planned, and found that the run can be done.

    Call it before models are loaded: what the first has downloaded or compiled is there then.
    """
    team.wait(_share(team.rank))


@contextlib.contextmanager
def shared(run: Run, team: Team | None) -> Iterator[None]:
    """``with shared(run, team): run.all(...)`` in the first process, or the only one.

    Inside, ``run`` has its own share of the tasks; behind it, its report knows of all.

    Raises:
        ProcessError: another process has failed.
        OutputError: the results of another one are not in this folder.
    """
    if team is None:
        yield
        return
    try:
        run.manifest.share()
    except OSError as error:
        where = printable(run.manifest.path)
        raise OutputError(f"{where} cannot be written: {error.strerror}") from error
    progress, tasks = run.progress, run.plan.tasks
    facts = run.share(team)
    for rank in range(1, team.size):
        team.post(_share(rank), _pack(run, tasks[rank :: team.size], facts))
    run.take(tasks[:: team.size])
    together = run.progress = _Together(progress, team, len(tasks))
    others = [task for number, task in enumerate(tasks) if number % team.size]
    try:
        yield
        _sum_up(run, team, others, together.look)
    except KeyboardInterrupt:
        # They were interrupted as well. One that does not end keeps its own records, which the
        # next run merges.
        last = time.monotonic() + _PATIENCE
        with contextlib.suppress(FmupsampleError, TimeoutError):
            _sum_up(run, team, [], lambda: _not_after(last))
        raise
    finally:
        run.progress = progress


def _sum_up(run: Run, team: Team, others: list[Task], meanwhile: Callable[[], None]) -> None:
    """Wait for all, and report what they did; ``others`` must be among that."""
    for rank in range(1, team.size):
        team.wait(_end(rank), meanwhile, by=rank)
    meanwhile()
    records = run.manifest.absorb()
    for task in others:
        if storable(task.source.absolute) not in records:
            raise OutputError(
                f"what became of {task.source} is not recorded in {printable(run.out)}: do all "
                "processes write into one and the same folder?"
            )
    for record in records.values():
        if record["status"] == "ok":
            run.report.done.append(record)
        elif record["status"] == "failed":
            run.report.failed.append(record)
            run.progress.warn(record["error"])


def help_out(
    begin: Callable[[Plan, Manifest, Progress], Run],
    work: Callable[[Run], None],
    plan: Plan,
    out: Path,
    team: Team,
) -> None:
    """Do the share of a process that is not the first; nothing is said to the user.

    Args:
        begin: makes the run, of ``plan`` with its share in it.
        work: does its tasks.
        plan: options and models, as this process has them.

    Raises:
        FmupsampleError: they are not those of the first process; and whatever ``work`` does.
    """
    share = team.fetch(_share(team.rank))
    if share["hash"] != plan.hash:
        raise FmupsampleError(
            f"process {team.rank + 1} of {team.size} has other models or options than the first: "
            "give all the same command and the same files"
        )
    # Named as the user did, where that means the same.
    folder = Path() if share["folder"] == os.getcwd() else Path(share["folder"])  # noqa: PTH109
    plan.tasks = [
        Task(from_plain(folder, source), PurePosixPath(output)) for source, output in share["tasks"]
    ]
    manifest = ManifestPart(out, team.rank)
    try:
        run = begin(plan, manifest, _Counting(team))
        run.earlier, run.kept = share["earlier"], set(share["kept"])
        run.share(team, share["facts"])
        work(run)
    except KeyboardInterrupt:
        manifest.close()
        team.post(_end(team.rank), True)
        raise
    finally:
        manifest.close()
    team.post(_end(team.rank), True)


def _pack(run: Run, tasks: list[Task], facts: dict[str, Any]) -> dict[str, Any]:
    """A share as plain values."""
    keys = {storable(task.source.absolute) for task in tasks}
    earlier = {key: name for key, name in run.earlier.items() if key in keys}
    return {
        "hash": run.plan.hash,
        "folder": os.getcwd(),  # noqa: PTH109 - as text
        "tasks": [(to_plain(t.source), str(t.output)) for t in tasks],
        "earlier": earlier,
        "kept": sorted(run.kept.intersection(earlier.values())),
        "facts": facts,
    }


class _Counting:
    """The progress of a process that is not the first: a number for the first to show."""

    def __init__(self, team: Team) -> None:
        self._team = team

    def start(self, total: int, label: str) -> None:
        pass

    def advance(self, steps: int = 1) -> None:
        self._team.add(_FINISHED, steps)

    def describe(self, label: str) -> None:
        pass

    def warn(self, message: str) -> None:
        pass  # the first reads it in the manifest


class _Together:
    """The progress of the first process, which counts what the others do as its own."""

    def __init__(self, progress: Progress, team: Team, total: int) -> None:
        self._progress, self._team, self._total = progress, team, total
        self._seen = 0

    def look(self) -> None:
        """Count what the others have done since."""
        finished = self._team.add(_FINISHED, 0)
        if finished > self._seen:
            self._progress.advance(finished - self._seen)
            self._seen = finished

    def start(self, total: int, label: str) -> None:
        self._progress.start(self._total, f"{label}, {self._team.size} processes")

    def advance(self, steps: int = 1) -> None:
        self._progress.advance(steps)
        self.look()

    def describe(self, label: str) -> None:
        self._progress.describe(label)

    def warn(self, message: str) -> None:
        self._progress.warn(message)


def _not_after(last: float) -> None:
    if time.monotonic() > last:
        raise TimeoutError


def _share(rank: int) -> str:
    return f"share of {rank}"


def _end(rank: int) -> str:
    return f"end of {rank}"
