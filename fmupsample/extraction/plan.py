"""What an extraction will do, decided before it starts: which files, how large, what is done."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from fmupsample.errors import ImageError, OutputError, UsageError
from fmupsample.formats.layout import WEIGHT_BITS, Layout, compact_bytes
from fmupsample.images import (
    Source,
    check_output_size,
    parse_output_size,
    printable,
    storable,
)
from fmupsample.images.find import stamp
from fmupsample.pipeline import Pipeline, map_sizes
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.registry import names_in_files
from fmupsample.video.frames import size_of
from fmupsample.writers import Manifest, check_format, file_bytes, output_names
from fmupsample.writers.formats import COMPACT, DTYPES, suffix_of
from fmupsample.writers.manifest import NAME as MANIFEST_NAME
from fmupsample.writers.manifest import Record, result_of

if TYPE_CHECKING:
    from fmupsample.writers.shards import Shards

PCA_NAME = "pca.safetensors"
# What options mean that are only recorded where they differ from it.
_UNSAID = {"views": 1, "global": False}
# Headers read for the estimate; with more pictures, evenly spaced ones stand for the rest.
_SAMPLE = 1000


@dataclass(frozen=True)
class ExtractOptions:
    """What is written for each picture.

    Attributes:
        format: ``"safetensors"``, ``"npy"``, ``"pt"``, or ``"compact"``: low-resolution values and
            kernel weights, of which :func:`fmupsample.open` makes the map.
        dtype: ``"fp32"``, ``"fp16"`` or ``"bf16"``, of the numbers in the file.
        weight_bits: of kernel weights in compact files: 8, 16 or 32.
        output_size: ``"image"``, ``"original"``, ``"HxW"`` or ``"x4"``.
        tokens_only: the low-resolution features, nothing upsampled.
        pca: keep this many principal components instead of all channels.
        global_vector: keep a vector of the whole picture beside the map, see
            :meth:`.Backbone.forward`.
        shard_size: write tar files of so many pictures each, see :mod:`fmupsample.writers.shards`;
            ``None``: a file a picture.
    """

    format: str = "safetensors"
    dtype: str = "fp16"
    output_size: str = "image"
    tokens_only: bool = False
    pca: int | None = None
    weight_bits: int = 16
    shard_size: int | None = None
    global_vector: bool = False

    def checked(self, pipeline: Pipeline) -> ExtractOptions:
        """The same in normal form.

        Raises:
            UsageError: unknown words, or a combination that cannot be.
        """
        check_format(self.format, self.dtype)
        size = check_output_size(self.output_size)
        channels = pipeline.backbone.channels
        if self.pca is not None and not 1 <= self.pca <= channels:
            raise UsageError(
                f"--pca {self.pca} is not possible: {pipeline.backbone.name} has {channels} "
                f"channels, so give 1 to {channels}"
            )
        if self.tokens_only and size != "image":
            raise UsageError("--tokens-only and --output-size exclude each other")
        if not self.tokens_only and pipeline.upsampler is None:
            raise UsageError("no upsampler was given: name one, or ask for --tokens-only")
        if self.format == COMPACT:
            self._check_compact(pipeline)
        if self.global_vector:
            if self.format == "npy":
                raise UsageError("npy files hold the map alone: use --format safetensors with "
                                 "--global")  # fmt: skip
            _ = pipeline.backbone.global_channels  # which raises where there is none
        if self.shard_size is not None:
            if self.shard_size < 1:
                raise UsageError(f"a shard of {self.shard_size} pictures is not possible")
            if self.format == "pt":
                raise UsageError(
                    "shards hold no pt files: use --format safetensors, compact or npy"
                )
        return replace(self, output_size=size)

    def _check_compact(self, pipeline: Pipeline) -> None:
        if self.tokens_only:
            raise UsageError("--tokens-only has no kernel weights to store: leave one of it and "
                             "--format compact away")  # fmt: skip
        if self.weight_bits not in WEIGHT_BITS:
            raise UsageError(f"--weight-bits {self.weight_bits} is not possible: use 8, 16 or 32")
        upsampler = pipeline.upsampler
        if not upsampler.linear_in_value or upsampler.neighbours is None:
            raise UsageError(
                f"upsampler {upsampler.name} has no kernel weights that a compact file could hold: "
                "leave --format compact away (whole maps), or name another upsampler"
            )

    def file_bytes(self, pipeline: Pipeline, original: tuple[int, int]) -> int:
        """About how large the file of a picture of ``original`` pixels is; errors as in shape."""
        shape = self.shape(pipeline, original)
        if self.format != COMPACT:
            return file_bytes(shape, self.dtype)
        frame = pipeline.frame(original)
        grid = pipeline.backbone.grid(frame.canvas)
        layout = compact_layout(pipeline.upsampler, grid, *map_sizes(frame, grid, shape[1:]))
        values = (shape[0], *grid)
        return compact_bytes(values, DTYPES[self.dtype].itemsize, layout, self.weight_bits)

    def shape(self, pipeline: Pipeline, original: tuple[int, int]) -> tuple[int, int, int]:
        """``(C, H, W)`` of the file of a picture of ``original`` pixels; ImageError as in frame."""
        frame = pipeline.frame(original)
        grid = pipeline.backbone.grid(frame.canvas)
        size = grid if self.tokens_only else parse_output_size(self.output_size, frame, grid)
        return (self.pca or pipeline.backbone.channels, *size)


def compact_layout(
    upsampler: Upsampler,
    cells: tuple[int, int],
    full: tuple[int, int],
    crop: tuple[int, int],
    size: tuple[int, int],
) -> Layout:
    """How a compact file of maps by ``upsampler`` is read."""
    kernel_size = upsampler.kernel_size_for(cells)
    return Layout(upsampler.neighbours, kernel_size, full, crop, size)


def describe(pipeline: Pipeline, options: ExtractOptions) -> dict[str, Any]:
    """Everything that decides the numbers in the results; equal dicts, equal results."""
    backbone, upsampler = pipeline.backbone, pipeline.upsampler
    upsampling = None if options.tokens_only else upsampler
    if backbone.fixed_size is not None:
        size = f"{backbone.fixed_size[0]}x{backbone.fixed_size[1]}"
    else:
        size = str(pipeline.image_size or backbone.default_image_size)
    described = {
        "backbone": backbone.name,
        "backbone_fingerprint": backbone.fingerprint,
        "layer": str(backbone.layer),
        "precision": pipeline.precision,
        "image_size": size,
        "fit": pipeline.fit,
        "upsampler": upsampling and upsampling.name,
        "upsampler_fingerprint": upsampling and upsampling.fingerprint,
        "output_size": "tokens" if options.tokens_only else options.output_size,
        "pca": options.pca,
        "dtype": options.dtype,
        "format": options.format,
    }
    if getattr(backbone, "views", 1) != 1:
        described["views"] = backbone.views
    if pipeline.window is not None:
        described["window"] = pipeline.window
    if options.global_vector:
        described["global"] = True
    if options.format == COMPACT:
        described["weight_bits"] = options.weight_bits
    if options.shard_size is not None:
        described["shards"] = True
    return described


def options_hash(described: dict[str, Any]) -> str:
    """12 hex digits."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]


@dataclass
class Task:
    """One picture to be done, and the file it will be in (relative to the output folder)."""

    source: Source
    output: PurePosixPath


@dataclass
class Plan:
    """What is to be done.

    Attributes:
        tasks: pictures to do.
        skipped: records of those finished by an earlier run with these options.
        moves: finished files (old, new) whose name is another one among today's pictures.
        bytes_needed: about, on top of what is there.
        estimate: the same as a sentence.
        shards: of a run that writes shards, and the records of the samples that stay in them.
    """

    options: ExtractOptions
    described: dict[str, Any]
    hash: str
    tasks: list[Task] = field(default_factory=list)
    skipped: list[Record] = field(default_factory=list)
    moves: list[tuple[PurePosixPath, Record]] = field(default_factory=list)
    bytes_needed: int = 0
    estimate: str = ""
    shards: Shards | None = None
    kept_samples: list[Record] = field(default_factory=list)


def make_plan(
    pipeline: Pipeline,
    sources: Sequence[Source],
    out: Path,
    options: ExtractOptions,
    manifest: Manifest,
    *,
    overwrite: bool,
    pca_fingerprint: str | None = None,
) -> Plan:
    """Compare what is wanted with what is there.

    Args:
        pca_fingerprint: of the basis in ``out``; results on another one do not count as finished.

    Raises:
        UsageError: ``out`` holds results made with other options, or files that are not ours.
        OutputError: the results will not fit on the disk.
    """
    described = describe(pipeline, options)
    plan = Plan(options, described, options_hash(described))

    def current(record: Record) -> bool:
        return record.get("pca_fingerprint") == pca_fingerprint

    if options.shard_size is not None:
        from fmupsample.extraction.shards import sort_out_shards

        replaced = sort_out_shards(
            plan, sources, out, manifest, overwrite=overwrite, current=current
        )
    else:
        names = output_names(sources, suffix_of(options.format), reserved=(MANIFEST_NAME, PCA_NAME))
        replaced = sort_out(
            plan, sources, names, out, manifest, overwrite=overwrite, current=current
        )
    _estimate(plan, pipeline, out, replaced)
    return plan


def sort_out(
    plan: Plan,
    sources: Sequence[Source],
    names: Sequence[PurePosixPath],
    out: Path,
    manifest: Manifest,
    *,
    overwrite: bool,
    current: Callable[[Record], bool] = lambda record: True,
) -> int:
    """Fill the lists of ``plan``: what is to be done, is done, or only needs another name.

    Args:
        names: of the results, relative to ``out``, in the order of ``sources``.
        current: whether a finished record of the same options still counts as finished.

    Returns:
        The bytes of the files that will be replaced.

    Raises:
        UsageError: as :func:`make_plan`.
    """
    if not overwrite:
        check_options(out, manifest, plan)
    owner = {name: record["source"] for name, record in manifest.pending.items()}
    owner |= {result_of(record): key for key, record in manifest.records.items()}
    replaced = 0
    for source, output in zip(sources, names, strict=True):
        key, name = storable(source.absolute), str(output)
        record = manifest.records.get(key)
        if (
            not overwrite
            and record is not None
            and current(record)
            and _is_done(out, source, record, plan.hash)
        ):
            if record["output"] == name:
                plan.skipped.append(record)
                continue
            if not _exists(out / output):
                plan.moves.append((PurePosixPath(record["output"]), {**record, "output": name}))
                continue
        if not overwrite:
            _check_free(out, output, key, owner)
        plan.tasks.append(Task(source, output))
        with contextlib.suppress(OSError):
            replaced += (out / output).stat().st_size
    return replaced


def is_current(source: Source, record: Record, wanted_hash: str) -> bool:
    """Whether ``record`` is of a result made with these options, of the file as it is now."""
    if record["status"] != "ok" or record.get("options_hash") != wanted_hash:
        return False
    now = stamp(source)
    return now is not None and now == (
        record.get("source_bytes"),
        record.get("source_mtime_ns"),
    )


def _is_done(out: Path, source: Source, record: Record, wanted_hash: str) -> bool:
    try:
        return is_current(source, record, wanted_hash) and (
            out / record["output"]
        ).stat().st_size == record.get("bytes")
    except (OSError, KeyError, TypeError):
        return False


def check_options(out: Path, manifest: Manifest, plan: Plan) -> None:
    """Raise a UsageError for finished results that were made with other options.

    Those of the same upsampler under an earlier name count as made with these.
    """
    for record in manifest.records.values():
        if record["status"] != "ok" or record.get("options_hash") == plan.hash:
            continue
        before = record.get("options") if isinstance(record.get("options"), dict) else {}
        name = plan.described.get("upsampler")
        renamed = {**before, "upsampler": name} == plan.described
        if renamed and before.get("upsampler") in names_in_files(name):
            record |= {"options": plan.described, "options_hash": plan.hash}
            continue
        keys = [*plan.described, *(key for key in before if key not in plan.described)]
        before, now = ({**_UNSAID, **options} for options in (before, plan.described))
        changed = {key for key in keys if before.get(key) != now.get(key)}
        for model in ("backbone", "upsampler"):
            if model in changed:  # another model has other weights: no need to say so
                changed.discard(f"{model}_fingerprint")
        if "views" in changed:
            changed.discard("backbone_fingerprint")
        shown = [
            f"{key.replace('_', ' ')} {before.get(key)} (now {now.get(key)})"
            for key in keys
            if key in changed
        ]
        raise UsageError(
            f"{printable(out)} holds results made with other options: {', '.join(shown[:4])}; "
            "choose another output folder, or --overwrite"
        )


def _exists(path: Path) -> bool:
    """Whether it is there; a name that is too long for the disk is not."""
    try:
        return path.exists()
    except OSError:
        return False


def _check_free(out: Path, output: PurePosixPath, key: str, owner: dict[str, str]) -> None:
    """Whether the file at ``output`` may be written: not there, or this picture's own."""
    mine = owner.get(str(output))
    if mine == key or not _exists(out / output):
        return
    if mine is None:
        raise UsageError(
            f"{printable(out / output)} exists and is not a result recorded in {MANIFEST_NAME}: "
            "choose another output folder, or --overwrite"
        )
    raise UsageError(
        f"{printable(out / output)} is the result of {printable(mine)}, now wanted for "
        f"{printable(key)}: choose another output folder, name both inputs in one run, or "
        "--overwrite"
    )


# -- disk space -----------------------------------------------------------------------------------


def _estimate(plan: Plan, pipeline: Pipeline, out: Path, replaced: int) -> None:
    step = max(1, -(-len(plan.tasks) // _SAMPLE))
    sizes = []
    for task in plan.tasks[::step]:
        try:
            sizes.append(size_of(task.source))
        except ImageError:
            continue  # it will be reported when its turn comes

    looked_at = len(plan.tasks[::step])

    def needed(options: ExtractOptions) -> int:
        total = 0
        for size in sizes:
            with contextlib.suppress(ImageError):
                total += options.file_bytes(pipeline, size)
        return round(total / max(1, looked_at) * len(plan.tasks))  # unreadable ones take nothing

    plan.bytes_needed = needed(plan.options)
    if not plan.tasks:
        plan.estimate = "nothing to do: all results are there"
        return
    free = shutil.disk_usage(out).free
    count = len(plan.tasks)
    plan.estimate = (
        f"{count} picture{'s' if count > 1 else ''}, {'about ' if step > 1 else ''}"
        f"{human_bytes(plan.bytes_needed)} in {plan.options.dtype} "
        f"({human_bytes(plan.bytes_needed // count)} each); {human_bytes(free)} free"
    )
    if getattr(pipeline.backbone, "views", 1) != 1:
        plan.estimate += f"; {pipeline.backbone.views} passes of the backbone for each"
    if plan.bytes_needed > free + replaced:
        smaller = ", ".join(
            f"{name}: {human_bytes(needed(options))}"
            for name, options in _smaller(plan, pipeline).items()
        )
        raise OutputError(
            f"the results need {human_bytes(plan.bytes_needed)}, but {printable(out)} has "
            f"{human_bytes(free)} free; nothing was started. Smaller: {smaller}"
        )


def _smaller(plan: Plan, pipeline: Pipeline) -> dict[str, ExtractOptions]:
    """Options that take less space, by what to type for them."""
    options = plan.options
    ways: dict[str, ExtractOptions] = {}
    if options.format != COMPACT and not options.tokens_only and pipeline.upsampler.neighbours:
        ways["--format compact"] = replace(options, format=COMPACT)
    if options.format == COMPACT and options.weight_bits > 8:
        ways["--weight-bits 8"] = replace(options, weight_bits=8)
    if options.dtype == "fp32":
        ways["--dtype fp16"] = replace(options, dtype="fp16")
    if (options.pca or pipeline.backbone.channels) > 32:
        ways["--pca 32"] = replace(options, pca=32)
    if not options.tokens_only:
        if not options.output_size.startswith("x"):
            ways["--output-size x4"] = replace(options, output_size="x4")
        ways["--tokens-only"] = replace(
            options,
            tokens_only=True,
            output_size="image",
            format="safetensors" if options.format == COMPACT else options.format,
        )
    return ways


def human_bytes(count: float) -> str:
    """``154 MB``; powers of 1000, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
