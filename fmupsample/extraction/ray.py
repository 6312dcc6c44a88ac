"""``extract`` on a Ray cluster: Ray Data hands out the pictures, actors hold the models.

The process that calls :func:`fmupsample.extraction.extract` plans, fits the basis and keeps the
manifest, as it does without a cluster. The tasks are the rows of a Ray data set, some pictures a
row, and each actor does a row as the share of a process is done, see :mod:`.sharing`: all machines
must see the same pictures and the same output folder. Where actors run, and what becomes of rows
whose actor has died, is for Ray to decide.
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fmupsample.errors import FmupsampleError, OutputError, ProcessError, UsageError
from fmupsample.extraction.plan import ExtractOptions, Plan, describe, options_hash
from fmupsample.extraction.projection import Projection
from fmupsample.extraction.run import ExtractReport, Run, run_kind
from fmupsample.extraction.sharing import open_for_others, pack_share, take_earlier, unpack_tasks
from fmupsample.images import printable, storable
from fmupsample.pipeline import Pipeline
from fmupsample.progress import SILENT
from fmupsample.video import FrameReader
from fmupsample.writers.manifest import Manifest, ManifestPart
from fmupsample.writers.shards import Shards, shard_name

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

    def all(self, run: Run, basis: Projection | None) -> None:
        """Every task of ``run``, as ``run.all(basis)`` does.

        Raises:
            ProcessError: the cluster cannot be reached, or a worker has failed.
            OutputError: as of ``run.all``; or a result is not in the output folder.
        """
        check_ray()
        run.progress.start(len(run.tasks), f"{run.label} on Ray")
        records = {}
        if run.tasks:
            open_for_others(run.manifest)
            try:
                with self._connected():
                    for record in self._records(run, basis):
                        run.manifest.append(record)
                        records[record["source"]] = record
                        run.collect([record])
            except KeyboardInterrupt:
                # Not merged: somewhere an actor may still write. The next run does that.
                found = Manifest(run.out).records
                sources = {storable(source.absolute) for source in run.tasks} - records.keys()
                rows = [found[source] for source in sources if source in found]
                run.report.done += [record for record in rows if record["status"] == "ok"]
                raise
            # What the actors have noted is in the rows they gave back, too; these say how an actor
            # did that had to do again what one that died has left.
            run.manifest.absorb()
            run.manifest.records.update(records)
        if run.plan.shards is not None:
            try:
                run.plan.shards.finish()  # which an earlier run has begun
            except OSError as error:
                raise OutputError(f"the shards cannot be written: {error.strerror}") from error

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

    def _records(self, run: Run, basis: Projection | None) -> Iterator[dict[str, Any]]:
        """What became of each picture, as it comes."""
        import ray
        import ray.data
        from ray.exceptions import RayError

        gpus = 0 if self.device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
        if self.device == "cuda" and not gpus:
            raise UsageError("--device cuda: the Ray cluster has no GPU")
        processors = gpus or int(ray.cluster_resources().get("CPU", 0))
        if not processors:
            raise ProcessError("the Ray cluster has neither GPUs nor CPUs for this run")
        chunks = _chunks(run, processors)
        ray.data.DataContext.get_current().enable_progress_bars = False
        size = min(processors, len(chunks))
        pipeline = run.pipeline
        place = pipeline.device
        try:
            _move(pipeline, torch.device("cpu"))  # as the actors may have no other device
            job = ray.put(
                Job(run.out.absolute(), run.plan.options, basis, pipeline, self, gpus > 0)
            )
        finally:
            _move(pipeline, place)
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
                    if record["status"] == "ok" and not (run.out / record["output"]).exists():
                        raise OutputError(
                            f"{record['output']} was written on a worker, but is not in "
                            f"{printable(run.out)}: do all machines see one and the same folder?"
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


def _chunks(run: Run, processors: int) -> list[str]:
    """The tasks as rows; with shards, a row is a shard."""
    tasks, size = run.plan.tasks, run.plan.options.shard_size
    facts = run.share(None)
    if size is None:
        size = max(
            -(-len(tasks) // _ROWS), min(_PICTURES, -(-len(tasks) // (processors * _ROWS_AN_ACTOR)))
        )
    starts = range(0, len(tasks), size)
    return [
        json.dumps(
            pack_share(run, tasks[start : start + size], facts)
            | {"number": number, "of": len(starts)}
        )
        for number, start in enumerate(starts)
    ]


def _move(pipeline: Pipeline, device: torch.device) -> None:
    pipeline.backbone.to(device)
    if pipeline.upsampler is not None:
        pipeline.upsampler.to(device)


@dataclass
class Job:
    """What all actors need, as it travels to them."""

    out: Path
    options: ExtractOptions
    basis: Projection | None
    pipeline: Pipeline  # on the CPU
    cluster: RayCluster
    gpu: bool

    def open(self) -> Pipeline:
        """The pipeline, with the device of this process."""
        made, cluster = self.pipeline, self.cluster
        return Pipeline(
            made.backbone,
            made.upsampler,
            image_size=made.image_size,
            fit=made.fit,
            device="cuda" if self.gpu else "cpu",
            precision=made.precision,
            batch_size=cluster.batch_size,
            workers=1 if cluster.workers is None and not self.gpu else cluster.workers,
            window=made.window,
            max_memory=made.max_memory,
        )


class Worker:
    """An actor: holds backbone and upsampler, and does rows of tasks."""

    def __init__(self, reference: dict[str, Any]) -> None:
        import ray

        self.job: Job = ray.get(reference["job"])
        name = uuid.uuid4()
        # Temporary files are named by this and the number of the process, which two machines share.
        os.environ["RANK"] = str(name.int % 10**9)
        self.pipeline = self.job.open()
        self.pipeline.reader = FrameReader()  # the next row may go on with this one's video
        self.described = describe(self.pipeline, self.job.options)
        self.manifest = ManifestPart(self.job.out, f"ray-{name.hex}")

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

    def _records(self, share: dict[str, Any]) -> list[dict[str, Any]]:
        """Do the tasks of a row; the records of all."""
        with contextlib.suppress(OSError):
            os.chdir(share["sources"]["folder"])  # so that pictures are named as the user did
        job = self.job
        plan = Plan(job.options, self.described, options_hash(self.described))
        if plan.hash != share["hash"]:
            raise ProcessError("a worker of the Ray cluster has another version of fmupsample")
        plan.tasks = unpack_tasks(share)
        report = ExtractReport(self.manifest.path, plan.described)
        run = run_kind(job.options)(self.pipeline, job.out, plan, self.manifest, report, SILENT)
        take_earlier(run, share)
        run.share(_Numbers(job.out, share), share["facts"])
        run.all(job.basis)
        return [*report.done, *report.failed]


class _Numbers:
    """Stands for the team that gives out numbers of shards: each row has its own.

    Those of a row that is done again, since its actor died, may be taken.
    """

    def __init__(self, out: Path, share: dict[str, Any]) -> None:
        self.out, self.share, self.given = out, share, 0

    def add(self, name: str, count: int) -> int:
        """One more than how many shards come before the next one of this row."""
        first, number, of = self.share["facts"]["next"], self.share["number"], self.share["of"]
        shards = Shards(self.out)
        while shard_name(first + number + of * self.given) in shards.sizes:
            self.given += 1
        return number + of * self.given + 1
