"""``probe predict``: masks or depths of many pictures, in a run that can be resumed.

What decides which pictures are to be done, the manifest, and writing beside computing are those of
:mod:`fmupsample.extraction`.
"""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fmupsample.atomic import replacing
from fmupsample.distributed import Team
from fmupsample.errors import OutputError, UsageError
from fmupsample.extraction.plan import Plan, Task, options_hash, sort_out
from fmupsample.extraction.run import ExtractReport, Run
from fmupsample.extraction.sharing import help_out, shared
from fmupsample.fingerprint import fingerprint
from fmupsample.finite import check_finite
from fmupsample.folders import refuse_others_files
from fmupsample.images.find import Source, printable, storable
from fmupsample.images.read import read_image
from fmupsample.pipeline import Item, Pipeline
from fmupsample.probing.probe import Probe
from fmupsample.progress import SILENT, Progress
from fmupsample.render.classes import draw_legend, mask_overlay, palette_of
from fmupsample.render.heat import heat_colours
from fmupsample.visualization.album import encode
from fmupsample.writers.background import Output
from fmupsample.writers.lock import FolderLock
from fmupsample.writers.manifest import NAME as MANIFEST_NAME
from fmupsample.writers.manifest import Manifest, Record
from fmupsample.writers.names import output_names
from fmupsample.writers.pictures import (
    Encode,
    PictureFile,
    deep_png,
    indexed_png,
    jpeg,
    npy_bytes,
)

AREAS, LEGEND, CLASSES = "areas.csv", "legend.png", "classes.json"
_RESERVED = (MANIFEST_NAME, AREAS, LEGEND, CLASSES)
# The same maps made by another revision of this code are made again.
_REVISION = 1


@dataclass(frozen=True)
class PredictOptions:
    """What is written beside the masks.

    Attributes:
        overlay: ``overlays/*.jpg``, the classes over the photograph (depth: ``colours/*.jpg``).
        npy: ``probabilities/*.npy`` float16 ``[classes, H, W]`` at the size the model saw (depth:
            ``metres/*.npy``, float32 ``[H, W]`` at the original pixels).
    """

    dtype: ClassVar[str] = "uint8"  # of a mask

    overlay: bool = False
    npy: bool = False


def predict_folder(
    probe: Probe,
    pipeline: Pipeline,
    sources: Sequence[Source],
    out: Path,
    options: PredictOptions | None = None,
    *,
    overwrite: bool = False,
    prune: bool = False,
    progress: Progress = SILENT,
    say: Callable[[str], None] = lambda message: None,
    team: Team | None = None,
) -> ExtractReport:
    """Write a mask (or depth map) of each picture into ``out``, at its original pixels.

    Masks are indexed PNGs whose values are the classes' own numbers; depths are 16-bit PNGs. Each
    record of ``manifest.jsonl`` holds the share of the picture that each class takes, and so does
    ``areas.csv`` at the end. Finished pictures are skipped when the run is repeated. A ``team``
    shares the work, and ``prune`` deletes, as in :func:`fmupsample.extraction.extract`.

    Raises:
        ProbeError: the probe was fitted on other features.
        UsageError, OutputError, KeyboardInterrupt: as :func:`fmupsample.extraction.extract`.
    """
    begun = time.perf_counter()
    options = options or PredictOptions()
    probe.check(pipeline)
    if team is not None and not team.leads:
        return _help_out(probe, pipeline, out, options, team)
    names = output_names(sources, ".png", reserved=_RESERVED)
    _lie_elsewhere(sources, out)
    with FolderLock(out):
        manifest = Manifest(out)
        if not overwrite and not manifest.records:
            refuse_others_files(
                out, (AREAS, LEGEND, CLASSES), ours=MANIFEST_NAME, keys=(),
                instead="choose another folder, or --overwrite",
            )  # fmt: skip
        described = describe(probe, pipeline, options)
        plan = Plan(options, described, options_hash(described))  # type: ignore[arg-type]

        def current(record: Record) -> bool:
            return all((out / name).is_file() for name in record.get("beside", ()))

        sort_out(plan, sources, names, out, manifest, overwrite=overwrite, current=current)
        # A mask under a new name would have to take its overlay along: it is made again.
        for _, record in plan.moves:
            source = next(s for s in sources if record["source"] == storable(s.absolute))
            plan.tasks.append(Task(source, PurePosixPath(record["output"])))
        plan.moves.clear()
        count = len(plan.tasks)
        plan.estimate = (
            f"{count} picture{'s' if count != 1 else ''} to do, {len(plan.skipped)} finished before"
        )
        if count and probe.views != 1:
            plan.estimate += f"; {probe.views} passes of the backbone for each"
        say(plan.estimate)
        report = ExtractReport(manifest.path, described, plan.estimate, skipped=plan.skipped)
        run = _Masks(probe, options, pipeline, out, plan, manifest, report, progress)
        if not overwrite:
            run.check_beside()
        try:
            if prune:
                run.prune()
            run.tidy()
            with shared(run, team):
                run.all(None)
            _describe_folder(probe, out, _masks_of(sources, manifest, plan.hash))
        except KeyboardInterrupt:
            finished = len(report.done) + len(report.skipped)
            progress.warn(
                f"stopped: {finished} of {len(sources)} pictures are finished; "
                "the same command goes on from there"
            )
            raise
        finally:
            manifest.close()
    report.seconds = time.perf_counter() - begun
    return report


def _help_out(
    probe: Probe, pipeline: Pipeline, out: Path, options: PredictOptions, team: Team
) -> ExtractReport:
    """The part of a process that is not the first."""
    described = describe(probe, pipeline, options)
    report = ExtractReport(out / MANIFEST_NAME, described)

    def begin(plan: Plan, manifest: Manifest, progress: Progress) -> Run:
        return _Masks(probe, options, pipeline, out, plan, manifest, report, progress)

    plan = Plan(options, described, options_hash(described))  # type: ignore[arg-type]
    help_out(begin, lambda run: run.all(None), plan, out, team)
    return report


def describe(probe: Probe, pipeline: Pipeline, options: PredictOptions) -> dict[str, Any]:
    """Everything that decides the results."""
    state = {"weight": probe.linear.weight, "bias": probe.linear.bias}
    return {
        **({} if probe.views == 1 else {"views": probe.views}),
        "probe": fingerprint(state),
        "task": probe.task,
        "classes": None if probe.classes is None else probe.classes.to_json(),
        "depth": probe.depth,
        "backbone": probe.backbone["name"],
        "backbone_fingerprint": probe.backbone["fingerprint"],
        "layer": str(probe.backbone["layer"]),
        "precision": pipeline.precision,
        "image_size": str(pipeline.image_size or probe.pictures["image_size"]),
        "fit": pipeline.fit,
        "upsampler": probe.upsampler["name"],
        "upsampler_fingerprint": probe.upsampler["fingerprint"],
        "overlay": options.overlay,
        "npy": options.npy,
        "revision": _REVISION,
    }


class _Masks(Run):
    """A mask for each picture, and what is wanted beside it."""

    label = "predicting"
    smaller = "use a smaller --image-size, or a smaller copy of it"

    def __init__(self, probe: Probe, options: PredictOptions, *rest: Any) -> None:
        super().__init__(*rest)
        self.probe, self.options = probe, options
        table = probe.classes
        if table is not None:
            self.indices = torch.tensor(table.indices, dtype=torch.uint8)
            self.palette = palette_of(table.colours, table.indices)

    def check_beside(self) -> None:
        """Raise a UsageError for files in the way that no run of ours made."""
        known = (*self.manifest.records.values(), *self.manifest.pending.values())
        ours = {name for record in known for name in record.get("beside", ())}
        for task in self.plan.tasks:
            for name in self.beside(task.output):
                if name not in ours and (self.out / name).exists():
                    raise UsageError(
                        f"{printable(self.out / name)} exists and is not a result recorded in "
                        "manifest.jsonl: choose another output folder, or --overwrite"
                    )

    def beside(self, output: PurePosixPath) -> list[str]:
        """Names of the other files: the overlay first, then the numbers, as far as wanted."""
        depth = self.probe.task == "depth"
        names = []
        if self.options.overlay:
            names.append(f"{'colours' if depth else 'overlays'}/{output.with_suffix('.jpg')}")
        if self.options.npy:
            names.append(f"{'metres' if depth else 'probabilities'}/{output.with_suffix('.npy')}")
        return names

    def promise(self, task: Task) -> Record:
        return super().promise(task) | {"beside": self.beside(task.output)}

    def parts(self, item: Item, basis: object) -> Iterator[Output | Tensor]:
        probe = self.probe
        with torch.no_grad():
            logits = check_finite(
                probe.logits(self.pipeline, item), item.source, "what is predicted"
            )
            decided = probe.decide(logits, item.frame.original)
        record = self.record(item.source, item, None)
        record["shape"] = list(decided.shape)
        record["beside"] = self.beside(self.tasks[item.source].output)
        if probe.classes is None:
            assert probe.depth is not None
            rows, encoders = decided.float().cpu(), self.depth_encoders()
            low, middle, high = np.quantile(rows.numpy(), (0, 0.5, 1))
            record["metres"] = {"min": float(low), "median": float(middle), "max": float(high)}
            main: Encode = partial(deep_png, scale=probe.depth["scale"])
        else:
            decided = decided.cpu()
            counts = torch.bincount(decided.flatten(), minlength=len(probe.classes))
            shares = (counts.double() / decided.numel()).tolist()
            record["areas"] = {
                name: round(share, 6)
                for name, share in zip(probe.classes.names, shares, strict=True)
            }
            rows, encoders = self.indices[decided], self.class_encoders(item, logits)
            main = partial(indexed_png, palette=self.palette)
        beside = [
            (self.out / name, encode)
            for name, encode in zip(record["beside"], encoders, strict=True)
        ]
        kind = partial(PictureFile, encode=main, beside=beside)
        path = self.out / self.tasks[item.source].output
        yield Output(path, kind, (1, *rows.shape), rows.dtype, {}, record)
        yield rows[None]

    def class_encoders(self, item: Item, logits: Tensor) -> list[Encode]:
        encoders: list[Encode] = []
        if self.options.overlay:
            encoders.append(
                lambda mask: jpeg(mask_overlay(read_image(item.source.path), mask, self.palette))
            )
        if self.options.npy:
            shares = logits.softmax(0).half().cpu().numpy()
            encoders.append(lambda mask: npy_bytes(shares))
        return encoders

    def depth_encoders(self) -> list[Encode]:
        assert self.probe.depth is not None
        low, high = self.probe.depth["near"], self.probe.depth["high"]
        encoders: list[Encode] = []
        if self.options.overlay:
            encoders.append(lambda metres: jpeg(depth_colours(metres, low, high)))
        if self.options.npy:
            encoders.append(npy_bytes)
        return encoders

    def record(self, source: Source, item: Item | None, basis: object) -> Record:
        record = super().record(source, item, None)
        if item is not None and self.probe.task == "depth":
            record["dtype"] = "uint16"
        return record


def depth_colours(metres: np.ndarray, low: float, high: float) -> np.ndarray:
    """Near is bright, far is dark, by the logarithm; the same colours in all pictures."""
    return heat_colours(-np.log(np.clip(metres, low, high)), -np.log(high), -np.log(low))


def _lie_elsewhere(sources: Sequence[Source], out: Path) -> None:
    inside = os.path.realpath(out) + os.sep
    for source in sources:
        if os.path.realpath(source.path).startswith(inside):
            raise UsageError(
                f"{source} lies in the output folder {printable(out)}, where the next run would "
                "take masks for pictures: choose another folder with --output"
            )


def _masks_of(sources: Sequence[Source], manifest: Manifest, made_with: str) -> list[Record]:
    """Records of the masks there are, those of pictures that cannot be read now among them."""
    known = (manifest.records.get(storable(source.absolute), {}) for source in sources)
    return [r for r in known if r.get("status") == "ok" and r.get("options_hash") == made_with]


def _describe_folder(probe: Probe, out: Path, records: Sequence[Record]) -> None:
    """The legend, the classes, and the areas of every picture of the run."""
    files: dict[str, bytes] = {}
    table = probe.classes
    if table is not None:
        files[LEGEND] = encode(draw_legend(table.names, table.colours, table.indices), ".png")
        listed = [
            {"value": value, "name": name, "colour": list(colour)}
            for value, name, colour in zip(table.indices, table.names, table.colours, strict=True)
        ]
        files[CLASSES] = (json.dumps(listed, indent=1) + "\n").encode()
    files[AREAS] = areas_csv(probe, records)
    try:
        for name, data in files.items():
            with replacing(out / name) as temporary:
                temporary.write_bytes(data)
    except OSError as error:
        raise OutputError(f"{printable(out / name)} cannot be written: {error.strerror}") from error


def areas_csv(probe: Probe, records: Sequence[Record]) -> bytes:
    """A line a picture: its size, and the share of each class (depth: metres)."""
    columns = ("min", "median", "max") if probe.classes is None else probe.classes.names
    key = "metres" if probe.classes is None else "areas"
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["picture", "height", "width", *columns])
    for record in sorted(records, key=lambda r: r["relative"]):
        shares = record.get(key, {})
        cells = [shares.get(column, "") for column in columns]
        writer.writerow([record["relative"], *record["shape"], *cells])
    return buffer.getvalue().encode("utf-8", "surrogateescape")
