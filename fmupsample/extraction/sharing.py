"""A run over several processes: the first plans and sums up, and each does a share of the pictures.

The share is fixed at the beginning, every n-th picture; a process that dies leaves its own undone,
which the next run does, however many processes that has. Only the first holds the lock of the
folder, moves, and removes what killed runs left, all before the others begin.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from fmupsample.distributed import Team
from fmupsample.errors import FmupsampleError, OutputError
from fmupsample.extraction.plan import Plan, Task
from fmupsample.images import printable, storable
from fmupsample.progress import Progress
from fmupsample.sharing import (
    Counting,
    Together,
    end_of,
    pack_sources,
    refuse_other_options,
    share_of,
    shortly,
    unpack_sources,
)
from fmupsample.writers.manifest import Manifest, ManifestPart

if TYPE_CHECKING:
    from fmupsample.extraction.run import Run


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
    open_for_others(run.manifest)
    progress, tasks = run.progress, run.plan.tasks
    facts = run.share(team)
    for rank in range(1, team.size):
        team.post(share_of(rank), pack_share(run, tasks[rank :: team.size], facts))
    run.take(tasks[:: team.size])
    together = run.progress = Together(progress, team, len(tasks))
    others = [task for number, task in enumerate(tasks) if number % team.size]
    try:
        yield
        _sum_up(run, team, others, together.look)
    except KeyboardInterrupt:
        # They were interrupted as well. One that does not end keeps its own records, which the
        # next run merges.
        with contextlib.suppress(FmupsampleError, TimeoutError):
            _sum_up(run, team, [], shortly())
        raise
    finally:
        run.progress = progress


def open_for_others(manifest: Manifest) -> None:
    """:meth:`Manifest.share`, with an OutputError."""
    try:
        manifest.share()
    except OSError as error:
        where = printable(manifest.path)
        raise OutputError(f"{where} cannot be written: {error.strerror}") from error


def _sum_up(run: Run, team: Team, others: list[Task], meanwhile: Callable[[], None]) -> None:
    """Wait for all, and report what they did; ``others`` must be among that."""
    for rank in range(1, team.size):
        team.wait(end_of(rank), meanwhile, by=rank)
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
    share = team.fetch(share_of(team.rank))
    refuse_other_options(share["hash"] == plan.hash, team)
    manifest = ManifestPart(out, f"{team.rank:05}")
    try:
        plan.tasks = unpack_tasks(share)
        run = begin(plan, manifest, Counting(team))
        take_earlier(run, share)
        run.share(team, share["facts"])
        work(run)
    except KeyboardInterrupt:
        manifest.close()
        team.post(end_of(team.rank), True)
        raise
    finally:
        manifest.close()
    team.post(end_of(team.rank), True)


def pack_share(run: Run, tasks: Sequence[Task], facts: dict[str, Any]) -> dict[str, Any]:
    """A share as plain values, for another process.

    Args:
        facts: what ``run.share`` gave.
    """
    keys = [storable(task.source.absolute) for task in tasks]
    earlier = {key: run.earlier[key] for key in keys if key in run.earlier}
    return {
        "hash": run.plan.hash,
        "sources": pack_sources([task.source for task in tasks]),
        "outputs": [str(task.output) for task in tasks],
        "earlier": earlier,
        "kept": sorted(run.kept.intersection(earlier.values())),
        "facts": facts,
    }


def unpack_tasks(share: dict[str, Any]) -> list[Task]:
    """The tasks of a share, for the plan of the run that does it."""
    return [
        Task(source, PurePosixPath(output))
        for source, output in zip(unpack_sources(share["sources"]), share["outputs"], strict=True)
    ]


def take_earlier(run: Run, share: dict[str, Any]) -> None:
    """Let the run of a share know what earlier runs have left for its pictures."""
    run.earlier, run.kept = share["earlier"], set(share["kept"])
