"""The output folder of a run: which results are there, whose they are, and how new ones get in."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from fmupsample._version import __version__
from fmupsample.atomic import remove_leftovers, sync
from fmupsample.errors import UsageError
from fmupsample.images.find import printable, stamp, storable
from fmupsample.runs.job import Job, Output, Task
from fmupsample.runs.manifest import Manifest, Record, result_of
from fmupsample.runs.plan import Plan, refuse_other_options


class Store:
    """A file for each result. One process at a time, under the :class:`.lock.FolderLock`.

    Args:
        manifest: of the folder, or the part of it that a process beside the first writes.
    """

    def __init__(self, out: Path, job: Job, manifest: Manifest) -> None:
        self.out, self.job, self.manifest = out, job, manifest
        # Files of earlier runs, by the key of their result: removed once others took their place.
        self.earlier = {key: result_of(record) for key, record in manifest.records.items()}
        self.kept: set[str] = set()

    # -- planning -----------------------------------------------------------------------------

    def plan(self, tasks: Sequence[Task], *, overwrite: bool) -> Plan:
        """Compare what is wanted with what is there.

        Raises:
            UsageError: the folder holds results made with other options, or files of others in the
                places of results; a result would replace one of the images.
        """
        self._refuse_to_replace_sources(tasks)
        if not overwrite and not self.job.redoes:
            refuse_other_options(self.out, self.manifest, self.job.recipe())
        plan = Plan()
        owner = self._owners()
        for task in tasks:
            record = self.manifest.records.get(task.key)
            if not overwrite and record is not None and self._is_done(task, record):
                if record["output"] == str(task.output):
                    plan.skipped.append(record)
                    continue
                if not task.beside and not os.path.exists(self.out / task.output):  # noqa: PTH110
                    new = {**record, "output": str(task.output)}
                    plan.moves.append((PurePosixPath(record["output"]), new))
                    continue
            if not overwrite:
                for name in (str(task.output), *task.beside):
                    self._refuse_files_of_others(name, task.key, owner)
            plan.tasks.append(task)
            with contextlib.suppress(OSError):
                plan.replaced += (self.out / task.output).stat().st_size
        self.kept = {record["output"] for record in plan.skipped}
        self.kept |= {record["output"] for _, record in plan.moves}
        self.kept |= {str(task.output) for task in plan.tasks}
        return plan

    def is_current(self, task: Task, record: Record) -> bool:
        """Whether a result was made by the recipe of ``task``, of the file as it is now."""
        if record["status"] != "ok" or record.get("options_hash") != self.job.recipe(task).hash:
            return False
        now = stamp(task.source)
        known = (record.get("source_bytes"), record.get("source_mtime_ns"))
        return now is not None and now == known and self.job.is_current(task, record)

    def _is_done(self, task: Task, record: Record) -> bool:
        try:
            return (
                self.is_current(task, record)
                and (self.out / record["output"]).stat().st_size == record.get("bytes")
                and all((self.out / name).is_file() for name in record.get("beside", ()))
            )
        except (OSError, KeyError, TypeError):
            return False

    def _owners(self) -> dict[str, str | None]:
        """Whose each file is that a run of ours has made or announced."""
        owner: dict[str, str | None] = {}
        for key, record in self.manifest.records.items():
            for name in (result_of(record), *record.get("beside", ())):
                owner[name] = key
            for drawing in record.get("pictures", {}).values():  # visualize, until version 0.1
                owner[drawing.get("output")] = None
        for record in self.manifest.pending.values():
            for name in (record["output"], *record.get("beside", ())):
                owner[name] = record["source"]
        return owner

    def _refuse_files_of_others(self, name: str, key: str, owner: dict[str, str | None]) -> None:
        path, ours = self.out / name, name in owner
        if ours and owner[name] in (key, None):
            return
        if not os.path.exists(path):  # noqa: PTH110 - False where a name is too long
            return
        if not ours:
            raise UsageError(
                f"{printable(path)} exists and is not a result recorded in "
                f"{self.manifest.path.name}: choose another output folder, or --overwrite"
            )
        raise UsageError(
            f"{printable(path)} is the result of {printable(owner[name])}, now wanted for "
            f"{printable(key)}: choose another output folder, name both inputs in one run, or "
            "--overwrite"
        )

    def _refuse_to_replace_sources(self, tasks: Sequence[Task]) -> None:
        real: dict[str, str] = {}  # folders, links followed

        def place(path: Path) -> str:
            parent, name = os.path.split(path)
            if parent not in real:
                real[parent] = os.path.realpath(parent)
            return os.path.join(real[parent], name)  # noqa: PTH118

        sources = {place(task.source.path) for task in tasks}
        for task in tasks:
            for name in (task.output, *task.beside):
                if place(self.out / name) in sources:
                    raise UsageError(
                        f"the result {printable(self.out / name)} would replace an image or video "
                        "of this run: choose another output folder"
                    )

    # -- before and after ---------------------------------------------------------------------

    def tidy(self, plan: Plan) -> None:
        """Remove what killed runs left, and rename results whose name is another one now."""
        folders = {self.out, self.manifest.path.parent}
        folders |= {(self.out / task.output).parent for task in plan.tasks}
        remove_leftovers(folder for folder in folders if os.path.isdir(folder))  # noqa: PTH112
        self.manifest.foresee(record for _, record in plan.moves)
        for old, record in plan.moves:
            new = self.out / record["output"]
            new.parent.mkdir(parents=True, exist_ok=True)
            self.manifest.expect(record)
            (self.out / old).replace(new)
            self.manifest.append(record)
            plan.skipped.append(record)
        self.manifest.foresee(map(self.promise, plan.tasks))

    def prune(self, plan: Plan) -> None:
        """Delete the results of sources that are no longer there."""
        wanted = {record["output"] for record in plan.skipped}
        for record in self._gone():
            for name in (result_of(record), *record.get("beside", ())):
                if name and name not in wanted:
                    with contextlib.suppress(OSError):
                        (self.out / name).unlink()
            self.earlier.pop(record["source"], None)
            self.manifest.forget(record["source"])

    def _gone(self) -> list[Record]:
        """Records of sources that are no longer there.

        Names that are not in UTF-8 cannot be looked for by what the manifest says: they stay.
        """
        return [
            record
            for record in self.manifest.records.values()
            if "\\udc" not in record["source"]
            and not os.path.exists(record.get("file") or record.get("video") or record["source"])  # noqa: PTH110
        ]

    def finish(self, tasks: Iterable[Task]) -> None:
        """All results are in: wait until their names are on the disk.

        Raises:
            OSError: they are not.
        """
        for folder in {(self.out / task.output).parent for task in tasks}:
            if os.path.isdir(folder):  # noqa: PTH112 - a name may be too long
                sync(folder)

    def close(self) -> None:
        """Leave what is unfinished for another run."""

    # -- results ------------------------------------------------------------------------------

    def promise(self, task: Task) -> Record:
        """What the manifest is told of a result before it is written."""
        promised = {
            "source": task.key,
            "relative": storable(task.source.relative),
            "output": str(task.output),
            "options_hash": self.job.recipe(task).hash,
        }
        return {**promised, "beside": list(task.beside)} if task.beside else promised

    def path(self, task: Task) -> Path:
        """Beside which the file of a result is written first."""
        return self.out / task.output

    def announce(self, output: Output) -> None:
        """Before a file is begun: it is on the disk that its name will be ours."""
        self.manifest.expect(self.promise(output.task))

    def keep(self, temporary: Path, output: Output, record: Record) -> None:
        """A file is whole: give it its name, and say in ``record`` how large it is."""
        record["bytes"] = temporary.stat().st_size
        sync(temporary)
        temporary.replace(self.path(output.task))

    def replaced(self, record: Record) -> None:
        """A result is recorded: the one that it replaces goes, if it has another name."""
        earlier = self.earlier.get(record["source"])
        if earlier and earlier != record["output"] and earlier not in self.kept:
            with contextlib.suppress(OSError):
                (self.out / earlier).unlink()

    # -- several processes --------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """What the stores of other processes must know."""
        return {}

    def join(self, facts: dict[str, Any], count: Any) -> None:
        """This is the store of one of several processes.

        Args:
            facts: of the first process.
            count: adds to a number that all processes share.
        """


def record_of(job: Job, task: Task, item: Any = None) -> Record:
    """What the manifest says about one result, but for how it ended."""
    recipe = job.recipe(task)
    record: Record = {
        "source": task.key,
        "relative": storable(task.source.relative),
        "status": "",
        "output": str(task.output),
        **task.source.facts,
    }
    if task.part:
        record |= {"file": storable(task.source.absolute), "part": task.part}
    if item is not None:
        record["source_bytes"], record["source_mtime_ns"] = item.stamp or (None, None)
        record |= {
            "frame": item.frame.to_json(),
            "grid": list(item.grid),
            "stride": list(job.pipeline.backbone.stride),
        }
        if item.window is not None:
            record["window"] = list(item.window)
        if task.beside:
            record["beside"] = list(task.beside)
    return record | {
        "options": recipe.options, "options_hash": recipe.hash, "version": __version__
    }  # fmt: skip
