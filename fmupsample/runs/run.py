"""A run from its beginning to its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fmupsample.images.find import Source
from fmupsample.progress import SILENT, Progress
from fmupsample.runs.engine import Report, Run
from fmupsample.runs.job import Job, Task
from fmupsample.runs.lock import FolderLock
from fmupsample.runs.manifest import Manifest, Record
from fmupsample.runs.plan import estimate
from fmupsample.runs.sharing import help_out, shared, store_of
from fmupsample.runs.workers import Workers

if TYPE_CHECKING:
    from fmupsample.runs.ray import RayCluster


def run(
    job: Job,
    sources: Sequence[Source],
    out: Path,
    *,
    overwrite: bool = False,
    prune: bool = False,
    progress: Progress = SILENT,
    say: Callable[[str], None] = lambda message: None,
    workers: Workers | None = None,
    cluster: RayCluster | None = None,
) -> Report:
    """Do ``job`` for all ``sources``, into the folder ``out``.

    Decoding, the models and writing overlap. An image that fails is reported to ``progress.warn``
    and in the report, and the run goes on. Results that are there are not made again. A run that is
    stopped, in whatever way, leaves only whole files.

    Args:
        overwrite: make everything anew, also over results made with other options.
        prune: delete the results of sources that are no longer there.
        say: is told what will be done and how much space that takes, before anything is computed.
        workers: processes that share the work, see :mod:`.workers`. The first is given all sources;
            the others none, and their report is of their own share.
        cluster: a Ray cluster that does the work in place of this process, see :mod:`.ray`.

    Raises:
        UsageError: options that cannot be, or that differ from those of the results in ``out``.
        OutputError: the results do not fit, or can no longer be written; finished ones stay.
        KeyboardInterrupt: finished ones stay, ``progress.warn`` says how to go on.
        ProcessError: another process has failed; finished ones stay.
    """
    began = time.perf_counter()
    if workers is not None and not workers.leads:
        return help_out(job, out, workers)
    with FolderLock(out):
        manifest = Manifest(out / job.log)
        store = store_of(job, out, manifest)
        tasks = job.tasks(sources)
        job.look(out, tasks, manifest, overwrite)
        plan = store.plan(tasks, overwrite=overwrite)
        sentence = estimate(plan, job, out)
        say(sentence)
        report = Report(manifest.path, job.recipe().options, sentence, skipped=plan.skipped)
        try:
            if prune:
                store.prune(plan)
            store.tidy(plan)
            if plan.tasks:
                job.prepare(out, sources, progress)
            do = Run(job, store, report, progress)
            if cluster is not None:
                cluster.all(do, plan.tasks)
            else:
                with shared(do, plan.tasks, workers) as share:
                    do.all(share)
            job.finish(out, _there(tasks, job, manifest), progress)
        except KeyboardInterrupt:
            finished = len(report.done) + len(report.skipped)
            progress.warn(
                f"stopped: {finished} of {len(tasks)} pictures are finished; "
                "the same command goes on from there"
            )
            raise
        finally:
            manifest.close()
    report.seconds = time.perf_counter() - began
    return report


def _there(tasks: Iterable[Task], job: Job, manifest: Manifest) -> list[Record]:
    """Records of the results that are there, those of images that cannot be read now too."""
    known = ((task, manifest.records.get(task.key, {})) for task in tasks)
    return [
        record
        for task, record in known
        if record.get("status") == "ok" and record.get("options_hash") == job.recipe(task).hash
    ]
