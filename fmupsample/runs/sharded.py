"""The store of ``extract --shard-size``: results in tar files of many images each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from fmupsample.errors import OutputError
from fmupsample.runs.job import Job, Output, Task
from fmupsample.runs.manifest import Manifest, Record
from fmupsample.runs.plan import Plan, refuse_other_options
from fmupsample.runs.shards import Shards, sample_keys
from fmupsample.runs.store import Store


class ShardStore(Store):
    """Puts each result into a shard; the output of a task is its key there."""

    def __init__(self, out: Path, job: Job, manifest: Manifest) -> None:
        super().__init__(out, job, manifest)
        self.earlier = {}  # replaced samples go with their shard
        self.shards = Shards(out, job.shard_size or 1, job.suffix)
        self.shards.before_naming = manifest.sync
        self._staying: list[Record] = []  # of samples

    def plan(self, tasks: Sequence[Task], *, overwrite: bool) -> Plan:
        """As of :class:`.Store`; a finished sample keeps its key."""
        recipe = self.job.recipe()
        for record in self.shards.unrecorded(self.manifest.records.values()):
            same = record.get("options_hash") == recipe.hash
            self.manifest.append(record | ({"options": recipe.options} if same else {}))
        if not overwrite:
            refuse_other_options(self.out, self.manifest, recipe)
        staying: dict[str, Record] = {
            key: record
            for key, record in self.manifest.records.items()
            if record["status"] == "ok" and self.shards.holds(record)
        }
        plan, todo = Plan(), []
        for task in tasks:
            record = staying.get(task.key)
            if not overwrite and record is not None and self.is_current(task, record):
                plan.skipped.append(record)
                continue
            todo.append(task)
            if task.source.path.exists():  # else it will be a failure, which takes nothing away
                staying.pop(task.key, None)
        taken = [record["key"] for record in staying.values()]
        keys = sample_keys([task.source for task in todo], self.job.suffix, taken)
        plan.tasks = [
            replace(task, output=PurePosixPath(key)) for task, key in zip(todo, keys, strict=True)
        ]
        self._staying = list(staying.values())
        return plan

    def prune(self, plan: Plan) -> None:
        gone = {record["source"] for record in self._gone()}
        self._staying = [r for r in self._staying if r["source"] not in gone]
        for source in gone:
            self.manifest.forget(source)

    def tidy(self, plan: Plan) -> None:
        super().tidy(plan)
        with _writing():
            moved = self.shards.resume(list(self.manifest.records.values()), self._staying)
            for record in moved:
                self.manifest.append(record)
            self.shards.drop()
        now = {record["source"]: record for record in moved}
        plan.skipped[:] = [now.get(record["source"], record) for record in plan.skipped]

    def finish(self, tasks: Sequence[Task]) -> None:
        with _writing():
            self.shards.finish()

    def close(self) -> None:
        self.shards.close()

    def path(self, task: Task) -> Path:
        return self.out / "features.tar"

    def announce(self, output: Output) -> None:
        """Nothing: where a sample is, is known once it is there."""
        output.record["key"] = str(output.task.output)

    def keep(self, temporary: Path, output: Output, record: Record) -> None:
        self.shards.keep(temporary, record)

    def facts(self) -> dict[str, Any]:
        return {"next": self.shards.next}

    def join(self, facts: dict[str, Any], count: Callable[[str, int], int]) -> None:
        """Each process fills shards of its own; their numbers are given out one by one."""
        self.shards.number = lambda: facts["next"] + count("shards begun", 1) - 1


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"the shards cannot be written: {reason}") from error
