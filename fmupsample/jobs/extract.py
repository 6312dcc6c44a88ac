"""``extract``: the dense features of each image, as a file for other programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmupsample._version import __version__
from fmupsample.atomic import replacing
from fmupsample.errors import FmupsampleError, OutputError
from fmupsample.finite import check_finite
from fmupsample.formats.compact import CompactFile
from fmupsample.formats.files import (
    COMPACT,
    DTYPES,
    FORMATS,
    file_bytes,
    suffix_of,
)
from fmupsample.formats.layout import Layout, compact_bytes, encode_weights
from fmupsample.images.find import Source
from fmupsample.images.names import output_names
from fmupsample.images.size import parse_output_size
from fmupsample.jobs.extract_options import ExtractOptions
from fmupsample.jobs.projection import Projection, ProjectionFit
from fmupsample.pipeline import Item, Pipeline, map_sizes
from fmupsample.progress import Progress
from fmupsample.runs.engine import Report
from fmupsample.runs.job import Job, Made, Output, Recipe, Task
from fmupsample.runs.manifest import NAME as MANIFEST_NAME
from fmupsample.runs.manifest import Manifest, Record
from fmupsample.runs.run import run
from fmupsample.runs.store import record_of

PCA_NAME = "pca.safetensors"
# The basis is computed from at most so many images, evenly spaced over the run.
PCA_IMAGES = 256


def extract(
    pipeline: Pipeline,
    sources: Sequence[Source],
    out: Path,
    options: ExtractOptions | None = None,
    **how: Any,
) -> ExtractReport:
    """Write the features of each image into ``out``, with a ``manifest.jsonl``.

    Args:
        how: the keyword arguments of :func:`fmupsample.runs.run.run`.

    Raises:
        FmupsampleError, KeyboardInterrupt: as there.
    """
    job = Extract(pipeline, options)
    report = run(job, sources, out, **how)
    return ExtractReport(**vars(report), explained=job.basis and job.basis.explained)


@dataclass
class ExtractReport(Report):
    """What a run did.

    Attributes:
        explained: with ``pca``, the share of the variance that is kept, 0..1.
    """

    explained: float | None = None


class Extract(Job):
    """The job: a map for each image, or what a map is made of."""

    def __init__(self, pipeline: Pipeline, options: ExtractOptions | None = None) -> None:
        super().__init__(pipeline)
        self.options = (options or ExtractOptions()).checked(pipeline)
        self.label = "extracting"
        self.smaller = "use --dtype fp16, --pca 32 or a smaller --output-size"
        self.suffix = suffix_of(self.options.format)
        self.shard_size = self.options.shard_size
        pipeline.global_vectors = self.options.global_vector
        self.basis: Projection | None = None

    # -- the plan -----------------------------------------------------------------------------

    def tasks(self, sources: Sequence[Source]) -> list[Task]:
        if self.shard_size is not None:  # where keys take the place of names
            return [Task(source, source.relative) for source in sources]
        names = output_names(sources, self.suffix, reserved=(MANIFEST_NAME, PCA_NAME))
        return [Task(source, name) for source, name in zip(sources, names, strict=True)]

    def recipe(self, task: Task | None = None) -> Recipe:
        return self._recipe

    @cached_property
    def _recipe(self) -> Recipe:
        options, pipeline = self.options, self.pipeline
        upsampling = None if options.tokens_only else pipeline.upsampler
        described = {
            **pipeline.describe(),
            "upsampler": upsampling and upsampling.name,
            "upsampler_fingerprint": upsampling and upsampling.fingerprint,
            "output_size": "tokens" if options.tokens_only else options.output_size,
            "pca": options.pca,
            "dtype": options.dtype,
            "format": options.format,
        }
        if options.global_vector:
            described["global"] = True
        if options.format == COMPACT:
            described["weight_bits"] = options.weight_bits
        if options.shard_size is not None:
            described["shards"] = True
        return Recipe.of(described)

    def is_current(self, task: Task, record: Record) -> bool:
        return record.get("pca_fingerprint") == (self.basis and self.basis.fingerprint)

    def bytes_of(self, size: tuple[int, int]) -> int:
        options, pipeline = self.options, self.pipeline
        frame = pipeline.frame(size)
        grid = pipeline.backbone.grid(frame.canvas)
        channels = options.pca or pipeline.backbone.channels
        if options.tokens_only:
            return file_bytes((channels, *grid), options.dtype)
        wanted = parse_output_size(options.output_size, frame, grid)
        if options.format != COMPACT:
            return file_bytes((channels, *wanted), options.dtype)
        layout = self._layout(grid, *map_sizes(frame, grid, wanted))
        width = DTYPES[options.dtype].itemsize
        return compact_bytes((channels, *grid), width, layout, options.weight_bits)

    def smaller_ways(self) -> dict[str, Job]:
        options, ways = self.options, {}
        if options.format != COMPACT and not options.tokens_only and self._has_weights():
            ways["--format compact"] = {"format": COMPACT}
        if options.format == COMPACT and options.weight_bits > 8:
            ways["--weight-bits 8"] = {"weight_bits": 8}
        if options.dtype == "fp32":
            ways["--dtype fp16"] = {"dtype": "fp16"}
        if (options.pca or self.pipeline.backbone.channels) > 32:
            ways["--pca 32"] = {"pca": 32}
        if not options.tokens_only:
            if not options.output_size.startswith("x"):
                ways["--output-size x4"] = {"output_size": "x4"}
            plain = "safetensors" if options.format == COMPACT else options.format
            ways["--tokens-only"] = {"tokens_only": True, "output_size": "image", "format": plain}
        return {
            words: Extract(self.pipeline, replace(options, **way)) for words, way in ways.items()
        }

    def _has_weights(self) -> bool:
        upsampler = self.pipeline.upsampler
        return upsampler.linear_in_value and upsampler.neighbours is not None

    # -- the PCA basis ------------------------------------------------------------------------

    def look(self, out: Path, tasks: Sequence[Task], manifest: Manifest, overwrite: bool) -> None:
        """New images fit old ones: the basis of an earlier run with these options stays."""
        if self.options.pca is not None and not overwrite:
            self.basis = self._saved_basis(out)

    def join(self, out: Path, facts: dict[str, Any]) -> None:
        self.basis = self._saved_basis(out) if self.options.pca is not None else None
        if (self.basis and self.basis.fingerprint) != facts["basis"]:
            raise FmupsampleError(
                f"{out / PCA_NAME} is not the basis that the first process uses: do all processes "
                "see the same files?"
            )

    def facts(self) -> dict[str, Any]:
        return {"basis": self.basis and self.basis.fingerprint}

    @property
    def _basis_hash(self) -> str:
        described = self._recipe.options
        keys = ("backbone_fingerprint", "layer", "precision", "image_size", "fit", "pca")
        keys = [key for key in (*keys, "views", "window") if key in described]
        return Recipe.of({key: described[key] for key in keys}).hash

    def _saved_basis(self, out: Path) -> Projection | None:
        path = out / PCA_NAME
        if not path.exists():
            return None
        basis, meta = Projection.load(path)
        return basis if meta.get("basis_hash") == self._basis_hash else None

    def prepare(self, out: Path, sources: Sequence[Source], progress: Progress) -> None:
        """Fit the basis and save it; images that cannot be used are reported in their turn."""
        if self.options.pca is None or self.basis is not None:
            return
        chosen = sources[:: max(1, -(-len(sources) // PCA_IMAGES))]
        fit = ProjectionFit(self.pipeline.backbone.channels)
        progress.start(len(chosen), "PCA basis")
        for item in self.pipeline.items(chosen, on_error=lambda source, error: progress.advance()):
            fit.add(self.pipeline.tokens(item))
            progress.advance()
        if fit.count == 0:
            return
        self.basis = fit.solve(self.options.pca)
        meta = {
            "tool": f"fmupsample {__version__}",
            "basis_hash": self._basis_hash,
            "pictures": str(len(chosen)),
            **{key: str(value) for key, value in self._recipe.options.items()},
        }
        try:
            with replacing(out / PCA_NAME) as temporary:
                self.basis.save(temporary, meta)
        except OSError as error:
            raise OutputError(f"cannot write {out / PCA_NAME}: {error.strerror}") from error

    # -- the files ----------------------------------------------------------------------------

    def outputs(
        self, tasks: Sequence[Task], items: Iterator[Item], advance: Callable[[], None]
    ) -> Iterator[Made]:
        """The file, and then what goes into it, on the CPU, in its numbers."""
        [task], [item], options = tasks, items, self.options
        if self.basis is None and options.pca is not None:
            raise FmupsampleError(f"{item.source}: there is no PCA basis to project it on")
        record = record_of(self, task, item) | {"dtype": options.dtype}
        if self.basis is not None:
            record["pca_fingerprint"] = self.basis.fingerprint
        value = item.features if self.basis is None else self.basis.apply(item.features)
        _check_range(item.source, value, options.dtype)
        output: Output | None = None
        for rows in self._contents(item, value):
            if output is None:
                kind, shape = self._kind(item, value, rows)
                record["shape"] = [value.shape[0], *self._size(item)]
                if item.global_vector is not None:
                    record["global"] = list(item.global_vector.shape)
                dtype = DTYPES[options.dtype]
                output = Output(task, kind, shape, dtype, _meta(record), record)
                yield output
            yield output, rows

    def _size(self, item: Item) -> tuple[int, int]:
        """``(H, W)`` of the map of an image."""
        if self.options.tokens_only:
            return tuple(self.pipeline.tokens(item).shape[1:])
        return parse_output_size(self.options.output_size, item.frame, item.grid)

    def _kind(self, item: Item, value: Tensor, first: Tensor) -> tuple[Any, tuple[int, ...]]:
        """What makes the file, and the shape it is told, given the first part for it."""
        vector = item.global_vector
        if vector is not None:
            vector = check_finite(vector, item.source, "the vector of the whole picture").cpu()
        if self.options.format != COMPACT:
            made = partial(FORMATS[self.options.format], vector=vector)
            return made, (value.shape[0], *first.shape[1:])
        layout = self._layout(item.grid, *map_sizes(item.frame, item.grid, self._size(item)))
        bits = self.options.weight_bits
        made = partial(CompactFile, layout=layout, weight_bits=bits, vector=vector)
        return made, tuple(value.shape)

    def _layout(
        self,
        cells: tuple[int, int],
        full: tuple[int, int],
        crop: tuple[int, int],
        size: tuple[int, int],
    ) -> Layout:
        """How a compact file of a map is read."""
        upsampler = self.pipeline.upsampler
        return Layout(upsampler.neighbours, upsampler.kernel_size_for(cells), full, crop, size)

    def _contents(self, item: Item, value: Tensor) -> Iterator[Tensor]:
        """The parts of the file: slices of the map, or the features and their kernel weights."""
        dtype = DTYPES[self.options.dtype]
        if self.options.format != COMPACT:
            for rows in self._slices(item, value):
                yield rows.to(dtype).cpu()
            return
        yield value.to(dtype).cpu()
        if self.pipeline.upsampler.kernel_size_for(item.grid) == 1:
            return
        for rows in self.pipeline.kernel_rows(item, self._size(item)):
            check_finite(rows, item.source, "what upsamples it")
            stored = encode_weights(rows, self.options.weight_bits).cpu()
            del rows
            yield stored

    def _slices(self, item: Item, value: Tensor) -> Iterator[Tensor]:
        """The map of the file, ``[c, H, W]`` at a time."""
        pipeline, options = self.pipeline, self.options
        if options.tokens_only:
            yield pipeline.tokens(item, value)
            return
        size = self._size(item)
        if pipeline.upsampler is not None and pipeline.upsampler.linear_in_value:
            if options.dtype != "fp32":
                # A lower precision, where it was asked for, also reassembles in half the bytes.
                value = value.to(pipeline.dtype)
            yield from pipeline.upsample_in_slices(item, size, value)
            return
        full = pipeline.upsample(item, size)
        yield full if self.basis is None else self.basis.apply(full)


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
    meta = {"tool": f"fmupsample {record['version']}", "options": json.dumps(options)}
    for key in ("source", "options_hash", "video", "pca_fingerprint"):
        if key in record:
            meta[key] = record[key]
    for key in ("frame", "grid", "stride", "window", "frame_index", "time"):
        if key in record:
            meta[key] = json.dumps(record[key])
    for key in ("backbone", "backbone_fingerprint", "layer", "upsampler", "upsampler_fingerprint",
                "views"):  # fmt: skip
        if options.get(key) is not None:
            meta[key] = str(options[key])
    return meta
