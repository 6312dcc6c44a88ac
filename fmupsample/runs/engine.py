"""The loop of a run: what is left to do is computed, image by image, and handed to the writer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from fmupsample.device import is_out_of_memory
from fmupsample.errors import FmupsampleError, OutputError
from fmupsample.images.find import Source
from fmupsample.pipeline import Item
from fmupsample.progress import Progress
from fmupsample.runs.job import Fault, Job, Output, Task
from fmupsample.runs.manifest import Record
from fmupsample.runs.store import Store, record_of
from fmupsample.runs.writer import BackgroundWriter
from fmupsample.video.frames import Film, images_of


@dataclass
class Report:
    """What a run did.

    Attributes:
        options: what decides the results, see :class:`.job.Recipe`.
        done: records of the results that this run made (see the manifest).
        skipped: records of those that were there.
        failed: records of those that could not be made, with ``error``.
        seconds: wall time of the run, without loading the models.
    """

    manifest: Path
    options: dict[str, Any]
    estimate: str = ""
    done: list[Record] = field(default_factory=list)
    skipped: list[Record] = field(default_factory=list)
    failed: list[Record] = field(default_factory=list)
    seconds: float = 0.0


class Run:
    """Does tasks; used by one thread."""

    def __init__(self, job: Job, store: Store, report: Report, progress: Progress) -> None:
        self.job, self.store, self.report, self.progress = job, store, report, progress
        self.tasks: dict[Source, list[Task]] = {}
        self._done = 0  # steps of the video in work

    def all(self, tasks: Sequence[Task]) -> None:
        """Every one of ``tasks``; those of a source follow each other."""
        self.tasks = by_source(tasks)
        self.progress.start(self.steps(tasks), self.job.label)
        writer = BackgroundWriter(self.store)
        try:
            last = time.perf_counter()
            with contextlib.closing(self._with_items()) as each:
                for of_source, items in each:
                    with contextlib.closing(items):
                        self._make(of_source, items, writer, last)
                    last = time.perf_counter()
                    self.collect(writer.finished())
            self.collect(writer.close())
            self.store.finish(tasks)
        except BaseException:
            with contextlib.suppress(Exception):
                self.collect(writer.abort())
            raise
        finally:
            self.store.close()

    def _with_items(self) -> Iterator[tuple[list[Task], Generator[Item]]]:
        """The tasks of each source with its items; images share batches, a film has its own."""
        films = [source for source in self.tasks if isinstance(source, Film)]
        images = [source for source in self.tasks if not isinstance(source, Film)]
        with contextlib.closing(self.job.items(images, on_error=self._unreadable)) as items:
            for item in items:
                yield self.tasks[item.source], (one for one in (item,))
                self.progress.advance()
        for film in films:
            expected = self.steps(self.tasks[film])
            self._done = 0
            yield self.tasks[film], self._frames(film)
            self.progress.advance(expected - self._done)  # those of a video that failed

    def _frames(self, film: Film) -> Generator[Item]:
        """The frames of a video; the first that fails ends it."""

        def fail(source: Source, error: Exception) -> None:
            raise error

        with contextlib.closing(self.job.pipeline.items(film.frames, on_error=fail)) as items:
            for item in items:
                yield item
                self._advance()

    def _advance(self) -> None:
        self._done += 1
        self.progress.advance()

    def steps(self, tasks: Sequence[Task]) -> int:
        """How often progress hears of ``tasks``."""
        of_each = by_source(tasks).items()
        return sum(len(images_of(source)) + self.job.steps(of) for source, of in of_each)

    def _make(
        self, tasks: list[Task], items: Iterator[Item], writer: BackgroundWriter, began: float
    ) -> None:
        """The results of one source, part by part."""
        left, begun = list(tasks), []
        try:
            for made in self.job.outputs(tasks, items, self._advance):
                if isinstance(made, Output):
                    writer.begin(made)
                    begun.append(made)
                    left.remove(made.task)
                elif isinstance(made, Fault):
                    self._fail([made.task], made.reason)
                    left.remove(made.task)
                else:
                    writer.add(*made)
            for output in begun:
                writer.end(output, time.perf_counter() - began)
        except Exception as error:
            reason = self._reason(error, tasks[0].source)
            for output in begun:
                writer.cancel(output, reason)
            self._fail(left, reason)

    def _reason(self, error: Exception, source: Source) -> str:
        """Why a source failed; other errors end the run."""
        if isinstance(error, FmupsampleError) and not isinstance(error, OutputError):
            return str(error)
        if is_out_of_memory(error):
            return f"{source}: the result does not fit into memory; {self.job.smaller}"
        if isinstance(error, OSError):
            return f"{source} cannot be read: {error.strerror or error}"
        raise error

    def _unreadable(self, source: Source, error: Exception) -> None:
        self._fail(self.tasks[source], str(error))
        self.progress.advance()

    def _fail(self, tasks: Sequence[Task], reason: str) -> None:
        for task in tasks:
            record = record_of(self.job, task)
            record |= {"status": "failed", "output": None, "error": reason}
            self.store.manifest.append(record)
            self.report.failed.append(record)
        if tasks:
            self.progress.warn(reason)

    def collect(self, records: Sequence[Record]) -> None:
        """Report what has been written; a result that another one replaces goes."""
        self.tell(records)
        for record in records:
            if record["status"] == "ok":
                self.store.replaced(record)

    def tell(self, records: Iterable[Record]) -> None:
        """Report what became of results."""
        told = ""
        for record in records:
            if record["status"] == "ok":
                self.report.done.append(record)
            elif record["status"] == "failed":
                self.report.failed.append(record)
                if record["error"] != told:  # of all results of an image, once
                    self.progress.warn(record["error"])
                told = record["error"]


def by_source(tasks: Sequence[Task]) -> dict[Source, list[Task]]:
    """The tasks of each source; one process does all of them."""
    return {source: list(of) for source, of in groupby(tasks, key=lambda task: task.source)}
