"""``probe predict``: the masks or depths of each image."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmupsample.atomic import replacing
from fmupsample.draw.classes import draw_legend, mask_overlay, palette_of
from fmupsample.draw.heat import heat_colours
from fmupsample.errors import OutputError, UsageError
from fmupsample.fingerprint import fingerprint
from fmupsample.finite import check_finite
from fmupsample.folders import refuse_others_files
from fmupsample.formats.pictures import (
    Draw,
    DrawnFile,
    deep_png,
    indexed_png,
    jpeg,
    npy_bytes,
    png,
)
from fmupsample.images.find import Source, printable
from fmupsample.images.names import output_names
from fmupsample.images.read import read_image
from fmupsample.pipeline import Item, Pipeline
from fmupsample.probing.probe import Probe
from fmupsample.progress import Progress
from fmupsample.runs.engine import Report
from fmupsample.runs.job import Job, Made, Output, Recipe, Task
from fmupsample.runs.manifest import NAME as MANIFEST_NAME
from fmupsample.runs.manifest import Manifest, Record
from fmupsample.runs.run import run
from fmupsample.runs.store import record_of

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

    overlay: bool = False
    npy: bool = False


def predict_folder(
    probe: Probe,
    pipeline: Pipeline,
    sources: Sequence[Source],
    out: Path,
    options: PredictOptions | None = None,
    **how: Any,
) -> Report:
    """Write a mask (or depth map) of each image into ``out``, at its original pixels.

    Masks are indexed PNGs whose values are the classes' own numbers; depths are 16-bit PNGs. Each
    record of ``manifest.jsonl`` holds the share of the image that each class takes, and so does
    ``areas.csv`` at the end.

    Args:
        how: the keyword arguments of :func:`fmupsample.runs.run.run`.

    Raises:
        ProbeError: the probe was fitted on other features.
        FmupsampleError, KeyboardInterrupt: as of :func:`fmupsample.runs.run.run`.
    """
    return run(Predict(probe, pipeline, options), sources, out, **how)


class Predict(Job):
    """The job: a mask for each image, and what is wanted beside it."""

    def __init__(
        self, probe: Probe, pipeline: Pipeline, options: PredictOptions | None = None
    ) -> None:
        super().__init__(pipeline)
        probe.check(pipeline)
        self.probe, self.options = probe, options or PredictOptions()
        self.label = "predicting"
        self.smaller = "use a smaller --image-size, or a smaller copy of it"
        self.suffix = ".png"
        table = probe.classes
        if table is not None:
            self.indices = torch.tensor(table.indices, dtype=torch.uint8)
            self.palette = palette_of(table.colours, table.indices)

    # -- the plan -----------------------------------------------------------------------------

    def tasks(self, sources: Sequence[Source]) -> list[Task]:
        depth = self.probe.task == "depth"
        folders = []
        if self.options.overlay:
            folders.append(("colours" if depth else "overlays", ".jpg"))
        if self.options.npy:
            folders.append(("metres" if depth else "probabilities", ".npy"))
        names = output_names(sources, ".png", reserved=_RESERVED)
        return [
            Task(source, name, beside=tuple(f"{f}/{name.with_suffix(end)}" for f, end in folders))
            for source, name in zip(sources, names, strict=True)
        ]

    def recipe(self, task: Task | None = None) -> Recipe:
        return self._recipe

    @cached_property
    def _recipe(self) -> Recipe:
        probe, pipeline = self.probe, self.pipeline
        state = {"weight": probe.linear.weight, "bias": probe.linear.bias}
        return Recipe.of({
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
            "overlay": self.options.overlay,
            "npy": self.options.npy,
            "revision": _REVISION,
        })  # fmt: skip

    def look(self, out: Path, tasks: Sequence[Task], manifest: Manifest, overwrite: bool) -> None:
        """Refuse images inside ``out``, and files of others in the places of ours."""
        inside = os.path.realpath(out) + os.sep
        for task in tasks:
            if os.path.realpath(task.source.path).startswith(inside):
                raise UsageError(
                    f"{task.source} lies in the output folder {printable(out)}, where the next run "
                    "would take masks for pictures: choose another folder with --output"
                )
        if not overwrite:
            refuse_others_files(
                out, (AREAS, LEGEND, CLASSES), ours=bool(manifest.records),
                instead="choose another folder, or --overwrite",
            )  # fmt: skip

    # -- the files ----------------------------------------------------------------------------

    def outputs(
        self, tasks: Sequence[Task], items: Iterator[Item], advance: Callable[[], None]
    ) -> Iterator[Made]:
        [task], [item] = tasks, items
        probe = self.probe
        with torch.no_grad():
            logits = probe.logits(self.pipeline, item)
            check_finite(logits, item.source, "what is predicted")
            decided = probe.decide(logits, item.frame.original).cpu()
        record = record_of(self, task, item) | {"shape": list(decided.shape)}
        if probe.classes is None:
            facts, draw, beside = self._depths(decided)
        else:
            facts, draw, beside = self._mask(item, logits, decided)
        kind = partial(DrawnFile, draw=draw)
        yield Output(task, kind, (0,), torch.uint8, {}, record | facts, beside=beside)

    def _mask(self, item: Item, logits: Tensor, decided: Tensor) -> tuple[Record, Draw, list[Draw]]:
        """Facts for the manifest, and what makes the bytes of each file."""
        table = self.probe.classes
        counts = torch.bincount(decided.flatten(), minlength=len(table))
        shares = (counts.double() / decided.numel()).tolist()
        areas = {name: round(share, 6) for name, share in zip(table.names, shares, strict=True)}
        mask, path, beside = self.indices[decided].numpy(), item.source.path, []
        if self.options.overlay:
            beside.append(lambda: jpeg(mask_overlay(read_image(path), mask, self.palette)))
        if self.options.npy:
            of_pixels = logits.softmax(0).half().cpu().numpy()
            beside.append(lambda: npy_bytes(of_pixels))
        facts = {"dtype": "uint8", "areas": areas}
        return facts, lambda: indexed_png(mask, self.palette), beside

    def _depths(self, decided: Tensor) -> tuple[Record, Draw, list[Draw]]:
        depth, metres, beside = self.probe.depth, decided.float().numpy(), []
        low, middle, high = (float(q) for q in np.quantile(metres, (0, 0.5, 1)))
        if self.options.overlay:
            near, far = depth["near"], depth["high"]
            beside.append(lambda: jpeg(depth_colours(metres, near, far)))
        if self.options.npy:
            beside.append(lambda: npy_bytes(metres))
        facts = {"dtype": "uint16", "metres": {"min": low, "median": middle, "max": high}}
        return facts, lambda: deep_png(metres, depth["scale"]), beside

    def finish(self, out: Path, records: Sequence[Record], progress: Progress) -> None:
        """The legend, the classes, and the areas of every image of the run."""
        files: dict[str, bytes] = {}
        table = self.probe.classes
        if table is not None:
            files[LEGEND] = png(draw_legend(table.names, table.colours, table.indices))
            rows = zip(table.indices, table.names, table.colours, strict=True)
            listed = [{"value": v, "name": n, "colour": list(c)} for v, n, c in rows]
            files[CLASSES] = (json.dumps(listed, indent=1) + "\n").encode()
        files[AREAS] = areas_csv(self.probe, records)
        try:
            for name, data in files.items():
                with replacing(out / name) as temporary:
                    temporary.write_bytes(data)
        except OSError as error:
            where = printable(out / name)
            raise OutputError(f"{where} cannot be written: {error.strerror}") from error


def depth_colours(metres: np.ndarray, low: float, high: float) -> np.ndarray:
    """Near is bright, far is dark, by the logarithm; the same colours in all pictures."""
    return heat_colours(-np.log(np.clip(metres, low, high)), -np.log(high), -np.log(low))


def areas_csv(probe: Probe, records: Sequence[Record]) -> bytes:
    """A line an image: its size, and the share of each class (depth: metres)."""
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
