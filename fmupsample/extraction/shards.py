"""``extract --shard-size``: the same run, with its results in tar files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from fmupsample.distributed import Team
from fmupsample.errors import OutputError
from fmupsample.extraction.plan import Plan, Task, check_options, is_current
from fmupsample.extraction.projection import Projection
from fmupsample.extraction.run import Run
from fmupsample.images import Source, storable
from fmupsample.pipeline import Item
from fmupsample.writers.background import Keep
from fmupsample.writers.formats import suffix_of
from fmupsample.writers.manifest import Manifest, Record
from fmupsample.writers.shards import Shards, sample_keys


def sort_out_shards(
    plan: Plan,
    sources: Sequence[Source],
    out: Path,
    manifest: Manifest,
    *,
    overwrite: bool,
    current: Callable[[Record], bool],
) -> int:
    """As :func:`fmupsample.extraction.plan.sort_out`, for results in shards.

    A finished sample keeps its key. ``plan.shards`` and ``plan.kept_samples`` are what
    :class:`ShardRun` goes on with.

    Returns:
        0: no file is replaced.
    """
    shards = Shards(out)
    for record in shards.unrecorded(manifest.records.values()):
        same = record.get("options_hash") == plan.hash
        manifest.append(record | ({"options": plan.described} if same else {}))
    if not overwrite:
        check_options(out, manifest, plan)
    kept: dict[str, Record] = {
        key: record
        for key, record in manifest.records.items()
        if record["status"] == "ok" and shards.holds(record)
    }
    todo = []
    for source in sources:
        key = storable(source.absolute)
        record = kept.get(key)
        if (
            not overwrite
            and record is not None
            and current(record)
            and is_current(source, record, plan.hash)
        ):
            plan.skipped.append(record)
        else:
            todo.append(source)
            if source.path.exists():  # else it will be a failure, which takes nothing away
                kept.pop(key, None)
    taken = [record["key"] for record in kept.values()]
    keys = sample_keys(todo, suffix_of(plan.options.format), taken)
    plan.tasks += [Task(source, PurePosixPath(key)) for source, key in zip(todo, keys, strict=True)]
    plan.shards, plan.kept_samples = shards, list(kept.values())
    return 0


class ShardRun(Run):
    """Puts each result into a shard."""

    def prune(self) -> None:
        gone = {record["source"] for record in self.gone()}
        plan = self.plan
        plan.kept_samples = [r for r in plan.kept_samples if r["source"] not in gone]
        for source in gone:
            self.manifest.forget(source)

    def tidy(self) -> None:
        super().tidy()
        self.earlier = {}  # replaced samples go with their shard, here
        plan = self.plan
        assert plan.shards is not None and plan.options.shard_size is not None
        plan.shards.before_naming = self.manifest.sync
        records, size = list(self.manifest.records.values()), plan.options.shard_size
        suffix = suffix_of(plan.options.format)
        try:
            moved = plan.shards.resume(records, plan.kept_samples, size, suffix)
            for record in moved:
                self.manifest.append(record)
            plan.shards.drop()
        except OSError as error:
            raise OutputError(f"the shards cannot be written: {error.strerror}") from error
        now = {record["source"]: record for record in moved}
        plan.skipped[:] = [now.get(record["source"], record) for record in plan.skipped]

    def share(self, team: Team | None, facts: dict[str, Any] | None = None) -> dict[str, Any]:
        """Each process fills shards of its own; their numbers are given out one by one."""
        plan = self.plan
        if facts is None:
            assert plan.shards is not None
            facts = {"next": plan.shards.next}
        else:
            assert plan.options.shard_size is not None
            plan.shards = Shards(self.out)
            plan.shards.before_naming = self.manifest.sync
            plan.shards.size, plan.shards.suffix = (
                plan.options.shard_size,
                suffix_of(plan.options.format),
            )
        if team is not None:
            first = facts["next"]
            plan.shards.number = lambda: first + team.add("shards begun", 1) - 1
        return facts

    def all(self, basis: Projection | None) -> None:
        assert self.plan.shards is not None
        try:
            super().all(basis)
            try:
                self.plan.shards.finish()
            except OSError as error:
                raise OutputError(f"the shards cannot be written: {error.strerror}") from error
        finally:
            self.plan.shards.close()

    def keeper(self) -> Keep:
        assert self.plan.shards is not None
        return self.plan.shards.keep

    def path(self, source: Source) -> Path:
        return self.out / "features.tar"  # beside which the sample is written first

    def record(self, source: Source, item: Item | None, basis: Projection | None) -> Record:
        record = super().record(source, item, basis)
        record["key"] = str(self.tasks[source].output)
        return record
