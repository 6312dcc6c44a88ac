"""A run on a Ray cluster: Ray Data hands out the images, actors hold the models.

The process that calls :func:`.run.run` plans and keeps the manifest, as it does without a cluster.
The tasks are the rows of a Ray data set, some images a row, and each actor does a row as the share
of a process is done, see :mod:`.sharing`: all machines must see the same images and the same output
folder. Where actors run, and what becomes of rows whose actor has died, is for Ray to decide.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import traceback
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fmupsample.errors import FmupsampleError, OutputError, ProcessError, UsageError
from fmupsample.images.find import printable
from fmupsample.progress import SILENT
from fmupsample.runs.engine import Run, by_source
from fmupsample.runs.job import Job, Task
from fmupsample.runs.manifest import Manifest, ManifestPart, Record
from fmupsample.runs.shards import Shards, shard_name
from fmupsample.runs.sharing import do_share, open_for_others, pack, unpack
from fmupsample.video.frames import FrameReader

# Rows of the data set: few enough for Ray to handle quickly, and no more pictures in one than an
# actor that dies may lose, where there are few.
_ROWS, _PICTURES = 2000, 16
_ROWS_AN_ACTOR = 4  # so that none waits long for the last
_SECONDS = 10  # for the head of a cluster to answer
_NAMED = re.compile(r"(\w+\.)*\w+(Error|Exception): ")  # a line of a traceback


def check_ray() -> None:
    """Raise a UsageError where Ray Data is not installed."""
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"--ray needs Ray Data, which cannot be imported ({error}): "
            "pip install 'fmupsample[ray]'"
        ) from error


@dataclass(frozen=True)
class RayCluster:
    """Where ``extract`` computes, in place of this process.

    One actor for each GPU of the cluster; without GPUs, or with ``device="cpu"``, for each CPU.

    Attributes:
        address: as of ``ray.init``: ``"auto"`` (the cluster that this machine is part of),
            ``"local"`` (one that is started here, for this run) or ``"HOST:PORT"``. A Ray that
            this process has initialised already is used in any case.
        device: of the actors, ``"auto"``, ``"cpu"`` or ``"cuda"``.
        batch_size, workers: of the actors' pipelines, see :class:`fmupsample.pipeline.Pipeline`.
    """

    address: str = "auto"
    device: str = "auto"
    batch_size: int | None = None
    workers: int | None = None

    def all(self, run: Run, tasks: Sequence[Task]) -> None:
        """Every one of ``tasks``, as ``run.all(tasks)`` does.

        Raises:
            ProcessError: the cluster cannot be reached, or a worker has failed.
            OutputError: as of ``run.all``; or a result is not in the output folder.
        """
        check_ray()
        manifest = run.store.manifest
        run.progress.start(len(tasks), f"{run.job.label} on Ray")
        records: dict[str, Record] = {}
        if tasks:
            open_for_others(manifest)
            try:
                with self._connected():
                    for record in self._records(run, tasks):
                        manifest.append(record)
                        records[record["source"]] = record
                        run.collect([record])
                        run.progress.advance()
            except KeyboardInterrupt:
                # Not merged: somewhere an actor may still write. The next run does that.
                found = Manifest(manifest.path.parent).records
                keys = {task.key for task in tasks} - records.keys()
                rows = [found[key] for key in keys if key in found]
                run.report.done += [record for record in rows if record["status"] == "ok"]
                raise
            # What the actors have noted is in the rows they gave back, too; these say how an actor
            # did that had to do again what one that died has left.
            manifest.absorb()
            manifest.records.update(records)
        run.store.finish(tasks)  # a shard that an earlier run has begun

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        import ray

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        if ray.is_initialized():
            yield
            return
        # Ray's own remarks on standard error are not for the user of a command.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        try:
            _knock(self.address)
            ray.init(address=self.address, logging_level=logging.ERROR, log_to_driver=False)
        except (ConnectionError, TimeoutError, RuntimeError, ValueError, OSError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ProcessError(
                f"the Ray cluster at {self.address!r} cannot be reached: {reason}; `ray status` "
                "shows whether it runs, and --ray local starts one here"
            ) from error
        try:
            yield
        finally:
            ray.shutdown()

    def _records(self, run: Run, tasks: Sequence[Task]) -> Iterator[Record]:
        """What became of each image, as it comes."""
        import ray
        import ray.data
        from ray.exceptions import RayError

        gpus = 0 if self.device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
        if self.device == "cuda" and not gpus:
            raise UsageError("--device cuda: the Ray cluster has no GPU")
        processors = gpus or int(ray.cluster_resources().get("CPU", 0))
        if not processors:
            raise ProcessError("the Ray cluster has neither GPUs nor CPUs for this run")
        chunks = _chunks(run, tasks, processors)
        ray.data.DataContext.get_current().enable_progress_bars = False
        size = min(processors, len(chunks))
        pipeline, out = run.job.pipeline, run.store.out
        place = pipeline.device
        try:
            pipeline.to(torch.device("cpu"))  # as the actors may have no other device
            job = ray.put(_Work(out.absolute(), run.job, self, gpus > 0))
        finally:
            pipeline.to(place)
        rows = ray.data.from_items([{"share": c} for c in chunks], override_num_blocks=len(chunks))
        done = rows.map_batches(
            Worker,
            fn_constructor_args=({"job": job},),  # each fetches it, whenever it is started
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=size),
            num_cpus=1,
            num_gpus=1 if gpus else None,
        )
        try:
            for row in done.iter_rows():
                answer = json.loads(row["done"])
                if "error" in answer:
                    kind = OutputError if answer["output"] else ProcessError
                    raise kind(answer["error"]) from _Remote(answer["traceback"])
                for record in answer["records"]:
                    if record["status"] == "ok" and not (out / record["output"]).exists():
                        raise OutputError(
                            f"{record['output']} was written on a worker, but is not in "
                            f"{printable(out)}: do all machines see one and the same folder?"
                        )
                    yield record
        except RayError as error:
            lines = [line for line in str(error).splitlines() if _NAMED.match(line)]
            reason = lines[-1] if lines else type(error).__name__
            raise ProcessError(_failed(reason)) from error


def _knock(address: str) -> None:
    """Raise an OSError where nobody answers at ``HOST:PORT``; Ray would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and "/" not in address and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS).close()


class _Remote(Exception):
    """A traceback of another process."""


def _failed(reason: str) -> str:
    return (
        f"a worker of the Ray cluster has failed: {reason}; what is finished is kept, and the "
        "same command goes on from there"
    )


def _chunks(run: Run, tasks: Sequence[Task], processors: int) -> list[str]:
    """The tasks as rows; with shards, a row is a shard."""
    groups, size = list(by_source(tasks).values()), run.job.shard_size
    if size is None:
        few = -(-len(groups) // (processors * _ROWS_AN_ACTOR))
        size = max(-(-len(groups) // _ROWS), min(_PICTURES, few))
    starts = range(0, len(groups), size)
    rows = ([t for g in groups[start : start + size] for t in g] for start in starts)
    return [
        json.dumps(pack(run.store, row) | {"number": number, "of": len(starts)})
        for number, row in enumerate(rows)
    ]


@dataclass
class _Work:
    """What all actors need, as it travels to them."""

    out: Path
    job: Job  # its models on the CPU
    cluster: RayCluster
    gpu: bool

    def open(self) -> Job:
        """The job, on the device of this process."""
        cluster, job = self.cluster, self.job
        job.pipeline = job.pipeline.elsewhere(
            "cuda" if self.gpu else "cpu",
            batch_size=cluster.batch_size,
            workers=1 if cluster.workers is None and not self.gpu else cluster.workers,
        )
        job.pipeline.reader = FrameReader()  # the next row may go on with this one's video
        return job


class Worker:
    """An actor: holds backbone and upsampler, and does rows of tasks."""

    def __init__(self, reference: dict[str, Any]) -> None:
        import ray

        work: _Work = ray.get(reference["job"])
        name = uuid.uuid4()
        # Temporary files are named by this and the number of the process, which two machines share.
        os.environ["RANK"] = str(name.int % 10**9)
        self.out, self.job = work.out, work.open()
        self.manifest = ManifestPart(self.out / self.job.log, f"ray-{name.hex}")

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """``{"share": rows}`` -> ``{"done": rows}``, both JSON."""
        return {"done": [json.dumps(self._answer(json.loads(row))) for row in batch["share"]]}

    def _answer(self, share: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"records": self._records(share)}
        except Exception as error:  # which Ray would wrap in many words
            ours = isinstance(error, FmupsampleError)
            reason = str(error) if ours else _failed(f"{type(error).__name__}: {error}")
            output = isinstance(error, OutputError)
            return {"error": reason, "output": output, "traceback": traceback.format_exc()}

    def _records(self, share: dict[str, Any]) -> list[Record]:
        """Do the tasks of a row; the records of all."""
        with contextlib.suppress(OSError):
            os.chdir(share["folder"])  # so that images are named as the user did
        if self.job.recipe().hash != share["hash"]:
            raise ProcessError("a worker of the Ray cluster has another version of fmupsample")
        tasks = [task for group in unpack(share) for task in group]
        count = partial(_next_shard, self.out, share, [0])
        report = do_share(self.job, self.out, self.manifest, share, tasks, SILENT, count)
        return [*report.done, *report.failed]


def _next_shard(out: Path, share: dict[str, Any], given: list[int], name: str, steps: int) -> int:
    """One more than how many shards come before the next one of a row: each has its own numbers.

    Those of a row that is done again, since its actor died, may be taken.
    """
    first, number, of = share["store"]["next"], share["number"], share["of"]
    shards = Shards(out)
    while shard_name(first + number + of * given[0]) in shards.sizes:
        given[0] += 1
    return number + of * given[0] + 1
