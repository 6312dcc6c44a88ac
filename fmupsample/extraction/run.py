"""``extract``: the dense features of many pictures, one file each, in a run that can be resumed."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fmupsample._version import __version__
from fmupsample.atomic import remove_leftovers, sync
from fmupsample.device import is_out_of_memory
from fmupsample.distributed import Team
from fmupsample.errors import FmupsampleError, OutputError
from fmupsample.extraction.basis import fit_basis, saved_basis
from fmupsample.extraction.plan import (
    ExtractOptions,
    Plan,
    Task,
    compact_layout,
    describe,
    make_plan,
    options_hash,
)
from fmupsample.extraction.projection import Projection
from fmupsample.extraction.sharing import help_out, shared
from fmupsample.finite import check_finite
from fmupsample.formats.layout import encode_weights
from fmupsample.images import Source, parse_output_size, storable
from fmupsample.pipeline import Item, Pipeline, map_sizes
from fmupsample.progress import SILENT, Progress
from fmupsample.writers import FORMATS, Manifest
from fmupsample.writers.background import BackgroundWriter, Keep, Output
from fmupsample.writers.compact import CompactFile
from fmupsample.writers.formats import COMPACT, DTYPES
from fmupsample.writers.lock import FolderLock
from fmupsample.writers.manifest import NAME as MANIFEST_NAME
from fmupsample.writers.manifest import Record, result_of

if TYPE_CHECKING:
    from fmupsample.extraction.ray import RayCluster


@dataclass
class ExtractReport:
    """What a run did.

    Attributes:
        done: records of the pictures finished by this run (see the manifest).
        skipped: records of those an earlier run had finished.
        failed: records of those that could not be done, with ``error``.
        seconds: wall time of the run, without loading the models.
        explained: with ``pca``, the share of the variance that is kept, 0..1.
    """

    manifest: Path
    options: dict[str, Any]
    estimate: str = ""
    done: list[Record] = field(default_factory=list)
    skipped: list[Record] = field(default_factory=list)
    failed: list[Record] = field(default_factory=list)
    seconds: float = 0.0
    explained: float | None = None


def extract(
    pipeline: Pipeline,
    sources: Sequence[Source],
    out: Path,
    options: ExtractOptions | None = None,
    *,
    overwrite: bool = False,
    prune: bool = False,
    progress: Progress = SILENT,
    say: Callable[[str], None] = lambda message: None,
    team: Team | None = None,
    cluster: RayCluster | None = None,
) -> ExtractReport:
    """Write the features of each picture into ``out``, with a ``manifest.jsonl``.

    Decoding, the backbone, upsampling and writing overlap. A picture that fails is reported to
    ``progress.warn`` and in the report, and the run goes on. Finished pictures are skipped when
    the run is repeated with the same options. A run that is stopped, in whatever way, leaves only
    whole files.

    Args:
        overwrite: redo everything, also over results made with other options.
        prune: delete the results of pictures that are no longer there.
        say: is told the estimate of the disk space, before anything is computed.
        team: processes that share the work, see :mod:`.sharing`. The first is given all
            pictures; the others none, and their report is empty.
        cluster: a Ray cluster that does the work in place of this process, see :mod:`.ray`.

    Raises:
        UsageError: options that cannot be, or that differ from those of the results in ``out``.
        OutputError: the results do not fit, or can no longer be written; finished ones stay.
        KeyboardInterrupt: finished ones stay, ``progress.warn`` says how to go on.
        ProcessError: another process has failed; finished ones stay.
    """
    began = time.perf_counter()
    options = (options or ExtractOptions()).checked(pipeline)
    if team is not None and not team.leads:
        return _help_out(pipeline, out, options, team)
    with FolderLock(out):
        manifest = Manifest(out)
        basis = None if overwrite else saved_basis(pipeline, options, out)
        plan = make_plan(
            pipeline,
            sources,
            out,
            options,
            manifest,
            overwrite=overwrite,
            pca_fingerprint=basis and basis.fingerprint,
        )
        say(plan.estimate)
        report = ExtractReport(manifest.path, plan.described, plan.estimate, skipped=plan.skipped)
        kind = run_kind(options)
        run = kind(pipeline, out, plan, manifest, report, progress)
        try:
            if prune:
                run.prune()
            run.tidy()
            if options.pca is not None:
                if basis is None and plan.tasks:
                    basis = fit_basis(pipeline, options, out, sources, progress)
                report.explained = basis and basis.explained
            if cluster is not None:
                cluster.all(run, basis)
            else:
                with shared(run, team):
                    run.all(basis)
        except KeyboardInterrupt:
            finished = len(report.done) + len(report.skipped)
            progress.warn(
                f"stopped: {finished} of {len(sources)} pictures are finished; "
                "the same command goes on from there"
            )
            raise
        finally:
            manifest.close()
    report.seconds = time.perf_counter() - began
    return report


def _help_out(pipeline: Pipeline, out: Path, options: ExtractOptions, team: Team) -> ExtractReport:
    """The part of a process that is not the first."""
    described = describe(pipeline, options)
    report = ExtractReport(out / MANIFEST_NAME, described)

    def begin(plan: Plan, manifest: Manifest, progress: Progress) -> Run:
        return run_kind(options)(pipeline, out, plan, manifest, report, progress)

    def work(run: Run) -> None:
        run.all(saved_basis(pipeline, options, out))

    help_out(begin, work, Plan(options, described, options_hash(described)), out, team)
    return report


def run_kind(options: ExtractOptions) -> type[Run]:
    """What does the work of a run with these options."""
    if options.shard_size is None:
        return Run
    from fmupsample.extraction.shards import ShardRun  # which is a Run

    return ShardRun


class Run:
    """The state of one run; ``all`` does the work.

    Runs that write something else for each picture override :meth:`parts` and :meth:`record`.
    """

    label = "extracting"
    smaller = "use a smaller --output-size or --pca"  # where a result does not fit into memory

    def __init__(
        self,
        pipeline: Pipeline,
        out: Path,
        plan: Plan,
        manifest: Manifest,
        report: ExtractReport,
        progress: Progress,
    ) -> None:
        self.pipeline, self.out, self.plan = pipeline, out, plan
        pipeline.global_vectors = getattr(plan.options, "global_vector", False)
        self.manifest, self.report, self.progress = manifest, report, progress
        self.tasks: dict[Source, Task] = {task.source: task for task in plan.tasks}
        # Results of earlier runs: removed once another file has taken their place.
        self.earlier = {key: result_of(record) for key, record in manifest.records.items()}
        self.kept = {r["output"] for r in plan.skipped} | {r["output"] for _, r in plan.moves}
        self.kept |= {str(task.output) for task in plan.tasks}

    def share(self, team: Team | None, facts: dict[str, Any] | None = None) -> dict[str, Any]:
        """Prepare to write beside the other processes of ``team``.

        Args:
            team: ``None``: this process writes nothing.
            facts: what this gave in the first process; ``None`` there.
        """
        return {}

    def take(self, tasks: Sequence[Task]) -> None:
        """Do these of the plan's tasks; others do the rest."""
        self.plan.tasks = list(tasks)
        self.tasks = {task.source: task for task in tasks}

    def tidy(self) -> None:
        """Remove what killed runs left, and rename results whose name is another one now."""
        folders = {self.out} | {(self.out / task.output).parent for task in self.plan.tasks}
        remove_leftovers(folder for folder in folders if os.path.isdir(folder))  # noqa: PTH112
        self.manifest.foresee(record for _, record in self.plan.moves)
        for old, record in self.plan.moves:
            new = self.out / record["output"]
            new.parent.mkdir(parents=True, exist_ok=True)
            self.manifest.expect(record)
            (self.out / old).replace(new)
            self.manifest.append(record)
            self.report.skipped.append(record)

    def prune(self) -> None:
        """Delete the results of pictures that are no longer there."""
        of_others = {record["output"] for record in self.plan.skipped}
        for record in self.gone():
            for name in (result_of(record), *record.get("beside", ())):
                if name and name not in of_others:
                    with contextlib.suppress(OSError):
                        (self.out / name).unlink()
            self.earlier.pop(record["source"], None)
            self.manifest.forget(record["source"])

    def gone(self) -> list[Record]:
        """Records of pictures that are no longer there.

        Names that are not in UTF-8 cannot be looked for by what the manifest says: they stay.
        """
        return [
            record
            for record in self.manifest.records.values()
            if "\\udc" not in record["source"]
            and not os.path.exists(record.get("video", record["source"]))  # noqa: PTH110
        ]

    def all(self, basis: Projection | None) -> None:
        """Every task of the plan."""
        self.progress.start(len(self.tasks), self.label)
        self.manifest.foresee(map(self.promise, self.plan.tasks))
        items = self.pipeline.items([task.source for task in self.plan.tasks], on_error=self.fail)
        writer = BackgroundWriter(self.manifest, self.keeper())
        try:
            last = time.perf_counter()
            for item in items:
                self.one(item, basis, writer, last)
                last = time.perf_counter()
                self.collect(writer.finished())
            self.collect(writer.close())
            for folder in {path.parent for path in map(self.path, self.tasks)}:
                if os.path.isdir(folder):  # noqa: PTH112 - a name may be too long
                    sync(folder)
        except BaseException:
            items.close()
            with contextlib.suppress(Exception):
                self.collect(writer.abort())
            raise

    def one(
        self, item: Item, basis: Projection | None, writer: BackgroundWriter, began: float
    ) -> None:
        """Upsample one picture and hand it to the writer, slice by slice."""
        started = False
        try:
            for part in self.parts(item, basis):
                if isinstance(part, Output):
                    writer.begin(part)
                    started = True
                else:
                    writer.add(part)
            writer.end(time.perf_counter() - began)
        except Exception as error:
            if not isinstance(error, OutputError) and isinstance(error, FmupsampleError):
                reason = str(error)
            elif is_out_of_memory(error):
                reason = f"{item.source}: the result does not fit into memory; {self.smaller}"
            elif isinstance(error, OSError):
                reason = f"{item.source} cannot be read: {error.strerror or error}"
            else:
                raise
            if started:
                writer.cancel(reason)
            else:
                self.fail(item.source, reason)

    def promise(self, task: Task) -> Record:
        """What the manifest is told of a result before it is written."""
        return {
            "source": storable(task.source.absolute),
            "relative": storable(task.source.relative),
            "output": str(task.output),
            "options_hash": self.plan.hash,
        }

    def keeper(self) -> Keep | None:
        """What is done with finished files; ``None``: they get their names."""
        return None

    def path(self, source: Source) -> Path:
        """Where the file of a picture goes."""
        return self.out / self.tasks[source].output

    def size(self, item: Item) -> tuple[int, int]:
        """``(H, W)`` of the map of a picture."""
        options = self.plan.options
        if options.tokens_only:
            return tuple(self.pipeline.tokens(item).shape[1:])
        return parse_output_size(options.output_size, item.frame, item.grid)

    def kind(self, item: Item, value: Tensor, first: Tensor) -> tuple[Any, tuple[int, ...]]:
        """What makes the file, and the shape it is told, given the first part for it."""
        options = self.plan.options
        vector = item.global_vector
        if vector is not None:
            vector = check_finite(vector, item.source, "the vector of the whole picture").cpu()
        if options.format != COMPACT:
            made = partial(FORMATS[options.format], vector=vector)
            return made, (value.shape[0], *first.shape[1:])
        sizes = map_sizes(item.frame, item.grid, self.size(item))
        layout = compact_layout(self.pipeline.upsampler, item.grid, *sizes)
        bits = options.weight_bits
        made = partial(CompactFile, layout=layout, weight_bits=bits, vector=vector)
        return made, tuple(value.shape)

    def parts(self, item: Item, basis: Projection | None) -> Iterator[Output | Tensor]:
        """The file, and then what goes into it, on the CPU, in its numbers."""
        options = self.plan.options
        if basis is None and options.pca is not None:
            raise FmupsampleError(f"{item.source}: there is no PCA basis to project it on")
        record = self.record(item.source, item, basis)
        value = item.features if basis is None else basis.apply(item.features)
        _check_range(item.source, value, options.dtype)
        dtype, started = DTYPES[options.dtype], False
        for rows in self.contents(item, value, basis):
            if not started:
                kind, shape = self.kind(item, value, rows)
                record["shape"] = [value.shape[0], *self.size(item)]
                if item.global_vector is not None:
                    record["global"] = list(item.global_vector.shape)
                path = self.path(item.source)
                yield Output(path, kind, shape, dtype, _meta(record), record)
                started = True
            yield rows

    def contents(self, item: Item, value: Tensor, basis: Projection | None) -> Iterator[Tensor]:
        """The parts of the file: slices of the map, or the features and their kernel weights."""
        options = self.plan.options
        dtype = DTYPES[options.dtype]
        if options.format != COMPACT:
            for rows in self.slices(item, value, basis):
                yield rows.to(dtype).cpu()
            return
        yield value.to(dtype).cpu()
        if self.pipeline.upsampler.kernel_size_for(item.grid) == 1:
            return
        for rows in self.pipeline.kernel_rows(item, self.size(item)):
            check_finite(rows, item.source, "what upsamples it")
            stored = encode_weights(rows, options.weight_bits).cpu()
            del rows
            yield stored

    def slices(self, item: Item, value: Tensor, basis: Projection | None) -> Iterator[Tensor]:
        """The map of the file, ``[c, H, W]`` at a time."""
        pipeline, options = self.pipeline, self.plan.options
        if options.tokens_only:
            yield pipeline.tokens(item, value)
            return
        size = self.size(item)
        if pipeline.upsampler is not None and pipeline.upsampler.linear_in_value:
            if options.dtype != "fp32":
                # A lower precision, where it was asked for, also reassembles in half the bytes.
                value = value.to(pipeline.dtype)
            yield from pipeline.upsample_in_slices(item, size, value)
            return
        full = pipeline.upsample(item, size)
        yield full if basis is None else basis.apply(full)

    def record(self, source: Source, item: Item | None, basis: Projection | None) -> Record:
        """What the manifest says about one picture, but for how it ended."""
        plan, backbone = self.plan, self.pipeline.backbone
        record: Record = {
            "source": storable(source.absolute),
            "relative": storable(source.relative),
            "status": "",
            "output": str(self.tasks[source].output),
            **source.facts,
        }
        if item is not None:
            record["source_bytes"], record["source_mtime_ns"] = item.stamp or (None, None)
            record |= {
                "dtype": plan.options.dtype,
                "frame": item.frame.to_json(),
                "grid": list(item.grid),
                "stride": list(backbone.stride),
            }
            if item.window is not None:
                record["window"] = list(item.window)
        record |= {"options": plan.described, "options_hash": plan.hash, "version": __version__}
        if basis is not None:
            record["pca_fingerprint"] = basis.fingerprint
        return record

    def fail(self, source: Source, error: FmupsampleError | str) -> None:
        record = self.record(source, None, None)
        record |= {"status": "failed", "output": None, "error": str(error)}
        self.manifest.append(record)
        self.collect([record])

    def collect(self, records: Sequence[Record]) -> None:
        """Count and report what has ended; a result that another one replaces goes."""
        for record in records:
            if record["status"] == "ok":
                self.report.done.append(record)
                earlier = self.earlier.get(record["source"])
                if earlier and earlier != record["output"] and earlier not in self.kept:
                    with contextlib.suppress(OSError):
                        (self.out / earlier).unlink()
            else:
                self.report.failed.append(record)
                self.progress.warn(record["error"])
            self.progress.advance()


def _check_range(source: Source, value: Tensor, dtype: str) -> None:
    """Weighted means stay within the range of what they average: looking at the LR map is enough.

    Raises:
        FmupsampleError: NaN or infinity, or numbers that ``dtype`` cannot hold.
    """
    low, high = value.aminmax()
    largest = float(torch.maximum(-low, high))  # NaN if there is one
    if not largest < float("inf"):
        raise FmupsampleError(f"{source}: the backbone gave NaN or infinity; try --precision fp32")
    if largest > torch.finfo(DTYPES[dtype]).max:
        raise FmupsampleError(
            f"{source}: features reach {largest:.3g}, beyond {dtype}; use --dtype bf16 or fp32"
        )


def _meta(record: Record) -> dict[str, str]:
    """The record as strings, for a file's header."""
    options = record["options"]
    meta = {
        "tool": f"fmupsample {record['version']}",
        "source": record["source"],
        "frame": json.dumps(record["frame"]),
        "grid": json.dumps(record["grid"]),
        "stride": json.dumps(record["stride"]),
        "options": json.dumps(options),
        "options_hash": record["options_hash"],
    }
    for key in ("backbone", "backbone_fingerprint", "layer", "upsampler", "upsampler_fingerprint"):
        if options[key] is not None:
            meta[key] = str(options[key])
    if "views" in options:
        meta["views"] = str(options["views"])
    if "video" in record:
        meta["video"] = record["video"]
    for key in ("window", "frame_index", "time"):
        if key in record:
            meta[key] = json.dumps(record[key])
    if "pca_fingerprint" in record:
        meta["pca_fingerprint"] = record["pca_fingerprint"]
    return meta
