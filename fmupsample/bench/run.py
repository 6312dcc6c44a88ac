"""``fmupsample bench``: what upsamplers cost on this device, for this backbone and these pictures.

One number is the time of one picture's whole map, float32 ``[C, H, W]``, from its features and the
normalised picture; the backbone's own pass stands beside it. See :mod:`fmupsample.bench.measuring`
for how time and memory are taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fmupsample.backbones import Backbone
from fmupsample.bench.machine import describe
from fmupsample.bench.measuring import Apart, Case, Here, OutOfMemory, summary, time_cases
from fmupsample.bench.methods import Method
from fmupsample.bench.pictures import drawn_picture
from fmupsample.device import is_out_of_memory
from fmupsample.errors import FmupsampleError, UsageError
from fmupsample.images.find import Source, storable
from fmupsample.images.prepare import fit_to_frame, normalise
from fmupsample.images.size import ImageSize
from fmupsample.memory import available_memory
from fmupsample.ops import backend
from fmupsample.pipeline import Pipeline
from fmupsample.progress import SILENT, Progress

FORMAT = "fmupsample-bench/1"
BACKBONE = "backbone"
MOST_PICTURES = 4  # that calls take turns with
LEAST_SIZE, MOST_SIZE = 16, 4096

# Keys of a row: ``peak_bytes`` includes the result, ``of_backbone`` is how many times its pass, and
# ``reason`` says why something is missing.
ROW = (
    *("size", "upsampler", "method", "weights", "pixels", "cells", "parameters", "macs"),
    *("median_s", "quartiles_s", "rounds", "peak_bytes", "output_bytes", "of_backbone", "reason"),
)
# Of each picture the features [C, h, w] and the normalised picture [3, H, W], float32.
Inputs = list[tuple[np.ndarray, ...]]


@dataclass(frozen=True)
class BenchOptions:
    """What is measured, and how often.

    Attributes:
        sizes: sides of the square that pictures are shown as; brought to the backbone's grid.
        rounds: every method is timed so often; three at least are, then fewer beyond ``seconds``.
        seconds: no further round of a size is begun after this.
        memory: measure the peak as well.
    """

    sizes: tuple[int, ...] = (224, 448)
    rounds: int = 7
    seconds: float = 90
    memory: bool = True

    def __post_init__(self) -> None:
        for size in self.sizes:
            if not LEAST_SIZE <= size <= MOST_SIZE:
                raise UsageError(
                    f"size {size} is not possible: give {LEAST_SIZE} to {MOST_SIZE} pixels"
                )
        if not self.sizes or len(set(self.sizes)) != len(self.sizes):
            raise UsageError("give sizes such as 224,448, each once")


@dataclass
class BenchReport:
    """What was measured so far.

    Attributes:
        rows: of each size the backbone and every method; see :meth:`Bench.run`.
        skipped: sizes that cannot be, with the reason.
        quality: what :mod:`fmupsample.bench.quality` found, or ``None``.
        complete: false while it runs, and after an interruption.
    """

    machine: dict[str, Any]
    device: str
    backend: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    quality: dict[str, Any] | None = None
    complete: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    def at(self, size: int) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["size"] == size]


def prepare(load: Callable[[], nn.Module], inputs: Inputs, device: str = "cpu") -> Case:
    """A call is the forward pass of the next picture; one is made here, so that all is loaded.

    Raises:
        FmupsampleError: the model cannot do this.
    """
    model = load().to(device)
    given = itertools.cycle(
        [[torch.from_numpy(array)[None].to(device) for array in one] for one in inputs]
    )

    @torch.no_grad()
    def run() -> Tensor:
        return model(*next(given))

    run()
    return run


class Bench:
    """Measures ``methods``; what is finished is in ``report``, also after an interruption.

    Args:
        load: makes the backbone, in other processes as well; takes ``image_size``.
        backbone: what it makes.
        sources: pictures; the first few are used, and a drawn one where there are none.
    """

    def __init__(
        self,
        load: Callable[..., Backbone],
        backbone: Backbone,
        methods: Sequence[Method],
        sources: Sequence[Source],
        device: torch.device,
        options: BenchOptions | None = None,
        progress: Progress = SILENT,
    ) -> None:
        self.load, self.backbone, self.methods = load, backbone, list(methods)
        self.sources, self.device = list(sources)[:MOST_PICTURES], device
        self.options, self.progress = options or BenchOptions(), progress
        self.report = BenchReport(
            machine=describe(device),
            device=str(device),
            backend=backend.prepare(device).name,
            settings={
                "backbone": self.backbone.name,
                "layer": self.backbone.layer,
                "channels": self.backbone.channels,
                "stride": list(self.backbone.stride),
                "sizes": list(self.options.sizes),
                "rounds": self.options.rounds,
                "pictures": [storable(s.path) for s in self.sources] or ["drawn"],
                "upsamplers": [m.name for m in self.methods],
                "dtype": "float32",
                "batch": 1,
            },
        )

    def run(self, saved: Callable[[], None] = lambda: None) -> BenchReport:
        """Every size in turn. ``saved`` is called after each.

        Rows have the keys of :data:`ROW`; what was not measured is ``None``.
        """
        for size in self.options.sizes:
            try:
                exact = tuple(max(1, round(size / m)) * m for m in self.backbone.size_multiple)
                if self.backbone.fixed_size not in (None, exact):
                    exact = (size, size)
                inputs = self._inputs(size, exact)
            except FmupsampleError as error:
                self.report.skipped[str(size)] = str(error)
            else:
                self._measure(size, exact, inputs)
            saved()
        return self.report

    def _inputs(self, size: int, exact: tuple[int, int]) -> Inputs:
        """Features and picture of each source at this size."""
        backbone = self.backbone
        if backbone.fixed_size not in (None, exact):
            backbone = self.load(image_size=exact)
        pipeline = Pipeline(backbone, image_size=ImageSize(exact=exact), device=self.device)
        canvases = [pipeline.load(source)[1] for source in self.sources]
        if not canvases:
            pixels = drawn_picture(2 * size)
            canvases = [fit_to_frame(pixels, pipeline.frame(pixels.shape[:2]))]
        images = [normalise(c, backbone.mean, backbone.std) for c in canvases]
        with torch.no_grad():
            features = [backbone(image[None].to(self.device))[0].float() for image in images]
        return [(f.cpu().numpy(), i.numpy()) for f, i in zip(features, images, strict=True)]

    def _measure(self, size: int, exact: tuple[int, int], inputs: Inputs) -> None:
        rows = {BACKBONE: self._row(size, inputs)}
        rows |= {method.name: self._row(size, inputs, method) for method in self.methods}
        times: dict[str, list[float]] = {}
        memory = self.options.memory
        try:
            with ExitStack() as stack:
                runners = self._runners(stack, exact, inputs, rows)
                peaks = len(runners) - (BACKBONE in runners) if memory else 0
                count = len(runners) * self.options.rounds + peaks
                self.progress.start(count, f"measuring at {exact[0]} px")
                found, failed = time_cases(
                    runners,
                    self.options.rounds,
                    seconds=self.options.seconds,
                    peaks=lambda name: memory and name != BACKBONE,
                    kept=times,
                    called=self.progress.advance,
                )
            for name, why in failed.items():
                rows[name.removeprefix("peak of ")]["reason"] = why
            for name, row in found.items():
                rows[name]["peak_bytes"] = row.get("peak_bytes")
        finally:
            _fill(rows, times)
            self.report.rows += rows.values()

    def _row(self, size: int, inputs: Inputs, method: Method | None = None) -> dict[str, Any]:
        """What is known without measuring (``None``: of the backbone), and why not to measure."""
        cells, pixels = inputs[0][0].shape[1:], inputs[0][1].shape[1:]
        row = dict.fromkeys(ROW) | {
            "size": size,
            "upsampler": method.name if method else BACKBONE,
            "method": method and method.row.name,
            "weights": method.weights if method else "trained",
            "pixels": list(pixels),
            "cells": list(cells),
            "rounds": 0,
        }
        if method is None:
            row["parameters"] = sum(p.numel() for p in self.backbone.parameters())
            return row
        row["reason"] = method.reason
        if method.reason is None:
            channels = self.backbone.channels
            row["output_bytes"] = output = 4 * channels * pixels[0] * pixels[1]
            try:
                price = method.build().cost(channels, cells, pixels)
            except FmupsampleError as error:
                row["reason"] = str(error)
            else:
                row |= {"parameters": price.parameters, "macs": price.macs}
                free = available_memory(self.device)
                if free is not None and 2 * output > free:
                    row["reason"] = f"its map needs more than the {free / 1e9:.1f} GB that are free"
        return row

    def _runners(
        self, stack: ExitStack, exact: tuple[int, int], inputs: Inputs, rows: dict[str, dict]
    ) -> dict[str, Here | Apart]:
        """What runs each case, in a process of its own on the CPU; the others get a reason."""
        runners: dict[str, Here | Apart] = {}
        self.progress.start(len(rows), f"starting at {exact[0]} px")
        cases: dict[str, tuple] = {m.name: (m.build, inputs) for m in self.methods}
        cases[BACKBONE] = partial(self.load, image_size=exact), [one[1:] for one in inputs]
        for name in (n for n, row in rows.items() if row["reason"] is None):
            try:
                if self.device.type == "cpu":
                    runners[name] = stack.enter_context(Apart(prepare, *cases[name]))
                else:
                    runners[name] = Here(prepare(*cases[name], str(self.device)), self.device)
            except (OutOfMemory, FmupsampleError, RuntimeError) as error:
                rows[name]["reason"] = "out of memory" if is_out_of_memory(error) else _line(error)
            self.progress.advance()
        return runners


def _fill(rows: dict[str, dict[str, Any]], times: dict[str, list[float]]) -> None:
    """Put seconds into rows, also those of a run that was interrupted."""
    for name, row in rows.items():
        if times.get(name):
            row |= summary(times[name])
        elif row["reason"] is None:
            row["reason"] = "interrupted"
    base = rows[BACKBONE]["median_s"]
    for row in rows.values():
        if base is not None and row["median_s"] is not None:
            row["of_backbone"] = row["median_s"] / base


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
