"""Shares of a run, as they travel to other processes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from fmupsample.atomic import temporary_for
from fmupsample.errors import FmupsampleError, OutputError
from fmupsample.images.find import printable
from fmupsample.progress import Progress
from fmupsample.runs.engine import Report, Run, by_source
from fmupsample.runs.job import Job, Task
from fmupsample.runs.manifest import Manifest, ManifestPart
from fmupsample.runs.sharded import ShardStore
from fmupsample.runs.store import Store
from fmupsample.runs.workers import Counting, Together, Workers, shortly
from fmupsample.video.frames import from_plain, to_plain


def store_of(job: Job, out: Path, manifest: Manifest) -> Store:
    """The store in which this job keeps its results."""
    return (Store if job.shard_size is None else ShardStore)(out, job, manifest)


def pack(store: Store, tasks: Sequence[Task]) -> dict[str, Any]:
    """``tasks`` and what must be known to do them, as JSON has it."""
    groups = by_source(tasks)
    earlier = {task.key: store.earlier[task.key] for task in tasks if task.key in store.earlier}
    return {
        "hash": store.job.recipe().hash,
        "folder": os.getcwd(),  # noqa: PTH109 - as text
        "sources": [to_plain(source) for source in groups],
        "tasks": [[[str(t.output), t.part, t.beside] for t in of] for of in groups.values()],
        "earlier": earlier,
        "kept": sorted(store.kept.intersection(earlier.values())),
        "job": store.job.facts(),
        "store": store.facts(),
    }


def unpack(share: dict[str, Any]) -> list[list[Task]]:
    """The tasks of each source; sources are named as the user did where that means the same."""
    folder = Path() if share["folder"] == os.getcwd() else Path(share["folder"])  # noqa: PTH109
    sources = [from_plain(folder, plain) for plain in share["sources"]]
    return [
        [Task(source, PurePosixPath(out), part, tuple(beside)) for out, part, beside in group]
        for source, group in zip(sources, share["tasks"], strict=True)
    ]


def open_for_others(manifest: Manifest) -> None:
    """:meth:`Manifest.share`, with an OutputError."""
    try:
        manifest.share()
    except OSError as error:
        where = printable(manifest.path)
        raise OutputError(f"{where} cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def shared(run: Run, tasks: Sequence[Task], workers: Workers | None) -> Iterator[Sequence[Task]]:
    """``with shared(run, tasks, workers) as share: run.all(share)`` in the first process.

    Behind it, the report of ``run`` knows of all tasks.

    Raises:
        ProcessError: another process has failed.
        OutputError: the results of another one are not in this folder.
    """
    if workers is None:
        yield tasks
        return
    store, progress = run.store, run.progress
    open_for_others(store.manifest)
    groups = list(by_source(tasks).values())
    plan = temporary_for(store.out / "plan", ".json")  # what a killed run leaves of it goes
    plan.write_text(json.dumps(pack(store, tasks)))
    store.join(store.facts(), workers.count)
    workers.post("plan", plan.name)
    together = run.progress = Together(progress, workers, run.steps(tasks))
    others = [t for rank in range(1, workers.size) for g in groups[rank :: workers.size] for t in g]
    try:
        yield [task for group in groups[:: workers.size] for task in group]
        workers.wait_for_others(together.look)
        together.look()
        _sum_up(run, others)
    except KeyboardInterrupt:
        # They were interrupted as well. One that does not end keeps its own part of the manifest,
        # which the next run merges.
        with contextlib.suppress(FmupsampleError, TimeoutError):
            workers.wait_for_others(shortly())
            _sum_up(run, [])
        raise
    finally:
        run.progress = progress
        plan.unlink(missing_ok=True)


def _sum_up(run: Run, others: Sequence[Task]) -> None:
    """Report what the others did; ``others`` must be among that."""
    records = run.store.manifest.absorb()
    for task in others:
        if task.key not in records:
            raise OutputError(
                f"what became of {task.source} is not recorded in {printable(run.store.out)}: do "
                "all processes write into one and the same folder?"
            )
    run.tell(records.values())


def help_out(job: Job, out: Path, workers: Workers) -> Report:
    """Do the share of a process that is not the first; nothing is said to the user.

    Raises:
        FmupsampleError: its models, options or files are not those of the first process.
    """
    path = out / workers.wait("plan")
    try:
        share = json.loads(path.read_text())
    except OSError as error:
        raise OutputError(
            f"{printable(path)}, left by the first process, cannot be read ({error.strerror}): do "
            "all processes write into one and the same folder?"
        ) from error
    if share["hash"] != job.recipe().hash:
        raise FmupsampleError(
            f"process {workers.rank + 1} of {workers.size} has other models or options than the "
            "first: give all the same command and the same files"
        )
    groups = unpack(share)[workers.rank :: workers.size]
    manifest = ManifestPart(out / job.log, f"{workers.rank:05}")
    try:
        tasks = [task for group in groups for task in group]
        report = do_share(job, out, manifest, share, tasks, Counting(workers), workers.count)
    except KeyboardInterrupt:
        manifest.close()
        workers.post(f"end {workers.rank}")
        raise
    finally:
        manifest.close()
    workers.post(f"end {workers.rank}")
    return report


def do_share(
    job: Job,
    out: Path,
    manifest: Manifest,
    share: dict[str, Any],
    tasks: Sequence[Task],
    progress: Progress,
    count: Callable[[str, int], int],
) -> Report:
    """Do ``tasks`` of a packed share.

    Args:
        manifest: the part that this process writes.
        count: adds to a number that all processes share.
    """
    job.join(out, share["job"])
    store = store_of(job, out, manifest)
    store.earlier, store.kept = share["earlier"], set(share["kept"])
    store.join(share["store"], count)
    manifest.foresee(map(store.promise, tasks))
    run = Run(job, store, Report(manifest.path, job.recipe().options), progress)
    run.all(tasks)
    return run.report
