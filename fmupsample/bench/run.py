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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmupsample.backbones import Backbone, load_backbone
from fmupsample.bench.machine import describe, free_bytes
from fmupsample.bench.measuring import Apart, Case, Here, OutOfMemory, Runner, summary, time_cases
from fmupsample.bench.methods import Method
from fmupsample.device import is_out_of_memory
from fmupsample.errors import FmupsampleError, UsageError
from fmupsample.images.find import Source, find_images, storable
from fmupsample.images.prepare import fit_to_frame, normalise
from fmupsample.images.size import ImageSize
from fmupsample.ops.backend import implementation
from fmupsample.pipeline import Pipeline
from fmupsample.progress import SILENT, Progress

FORMAT = "fmupsample-bench/1"
BACKBONE = "backbone"
MOST_PICTURES = 4  # that calls take turns with
LEAST_SIZE, MOST_SIZE = 16, 4096
_EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "images"


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
        if self.rounds < 1 or self.seconds <= 0:
            raise UsageError("rounds and seconds must be more than 0")


@dataclass(frozen=True)
class BackboneChoice:
    """The arguments of :func:`fmupsample.load_backbone`, to load it again elsewhere."""

    name: str = "embedded"
    layer: int | str | None = None
    weights: Path | None = None

    def load(self, image_size: tuple[int, int] | None = None) -> Backbone:
        return load_backbone(
            self.name, layer=self.layer, weights=self.weights, image_size=image_size
        )


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


@dataclass
class _Inputs:
    """Some pictures of one size, as they go to another process."""

    images: list[np.ndarray]  # normalised, float32 [3, H, W]
    features: list[np.ndarray]  # float32 [C, h, w]

    def on(self, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        pairs = zip(self.features, self.images, strict=True)
        return [tuple(torch.from_numpy(a)[None].to(device) for a in pair) for pair in pairs]

    @property
    def pixels(self) -> tuple[int, int]:
        return self.images[0].shape[1], self.images[0].shape[2]

    @property
    def cells(self) -> tuple[int, int]:
        return self.features[0].shape[1], self.features[0].shape[2]


def prepare(method: Method, inputs: _Inputs, device: str = "cpu") -> Case:
    """A call makes the map of the next picture. It is tried once, so that what it loads is there.

    Raises:
        FmupsampleError: the method cannot do this.
    """
    upsampler = method.build().to(device)
    given = itertools.cycle(inputs.on(torch.device(device)))

    @torch.no_grad()
    def run() -> Tensor:
        return upsampler(*next(given))

    run()
    return run


def prepare_backbone(
    choice: BackboneChoice, size: tuple[int, int], inputs: _Inputs, device: str = "cpu"
) -> Case:
    """A call is the forward pass of the next picture."""
    backbone = choice.load(size).to(device)
    given = itertools.cycle(inputs.on(torch.device(device)))

    @torch.no_grad()
    def run() -> Tensor:
        return backbone(next(given)[1])

    run()
    return run


class Bench:
    """Measures ``methods``; what is finished is in ``report``, also after an interruption."""

    def __init__(
        self,
        choice: BackboneChoice,
        backbone: Backbone,
        methods: Sequence[Method],
        sources: Sequence[Source],
        device: torch.device,
        options: BenchOptions | None = None,
        progress: Progress = SILENT,
    ) -> None:
        """
        Args:
            backbone: what ``choice`` loads.
            sources: pictures; the first few are used, and drawn ones where there are none.
        """
        self.choice, self.backbone, self.methods = choice, backbone, list(methods)
        self.sources, self.device = list(sources)[:MOST_PICTURES], device
        self.options, self.progress = options or BenchOptions(), progress
        self.report = BenchReport(
            machine=describe(device),
            device=str(device),
            backend=_backend(device),
            settings={
                "backbone": backbone.name,
                "layer": backbone.layer,
                "channels": backbone.channels,
                "stride": list(backbone.stride),
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

        A row has ``size``, ``upsampler``, ``method``, ``weights``, ``pixels``, ``cells``,
        ``parameters``, ``macs``, ``median_s``, ``quartiles_s``, ``rounds``, ``peak_bytes`` (result
        included), ``output_bytes``, ``of_backbone`` (times its pass) and ``reason`` (why something
        is missing); what was not measured is ``None``.
        """
        for size in self.options.sizes:
            try:
                inputs, exact = self._inputs(size)
            except FmupsampleError as error:
                self.report.skipped[str(size)] = str(error)
            else:
                self._measure(size, exact, inputs)
            saved()
        return self.report

    def _inputs(self, size: int) -> tuple[_Inputs, tuple[int, int]]:
        """The pictures at this size, and what the backbone was loaded for."""
        multiples = self.backbone.size_multiple
        exact = tuple(max(1, round(size / m)) * m for m in multiples)
        backbone = self.backbone
        if backbone.fixed_size not in (None, exact):
            exact = (size, size)
            backbone = self.choice.load(exact)
        pipeline = Pipeline(backbone, image_size=ImageSize(exact=exact), device=self.device)
        canvases = [pipeline.load(source)[1] for source in self.sources]
        if not canvases:
            pixels = drawn_picture(2 * size)
            canvases = [fit_to_frame(pixels, pipeline.frame(pixels.shape[:2]))]
        images = [normalise(c, backbone.mean, backbone.std) for c in canvases]
        with torch.no_grad():
            features = [backbone(image[None].to(self.device))[0].float() for image in images]
        return _Inputs([i.numpy() for i in images], [f.cpu().numpy() for f in features]), exact

    def _measure(self, size: int, exact: tuple[int, int], inputs: _Inputs) -> None:
        reasons: dict[str, str] = {}
        kept: dict[str, list[float]] = {}
        peaks: dict[str, int] = {}
        with ExitStack() as stack:
            try:
                runners = self._runners(stack, size, exact, inputs, reasons)
                count = len(runners) * self.options.rounds
                if self.options.memory:
                    count += len(runners) - (BACKBONE in runners)
                self.progress.start(count, f"measuring at {inputs.pixels[0]} px")
                rows, failed = time_cases(
                    runners,
                    self.options.rounds,
                    seconds=self.options.seconds,
                    warm_up=False,  # they were tried
                    peaks=lambda name: self.options.memory and name != BACKBONE,
                    kept=kept,
                    called=self.progress.advance,
                )
                reasons |= {name.removeprefix("peak of "): why for name, why in failed.items()}
                peaks = {n: row["peak_bytes"] for n, row in rows.items() if "peak_bytes" in row}
            finally:
                timed = {name: summary(times) for name, times in kept.items() if times}
                self._add(size, inputs, timed, peaks, reasons)

    def _runners(
        self,
        stack: ExitStack,
        size: int,
        exact: tuple[int, int],
        inputs: _Inputs,
        reasons: dict[str, str],
    ) -> dict[str, Runner]:
        """What runs each case, in a process of its own on the CPU; the others get a reason."""
        runners: dict[str, Runner] = {}
        self.progress.start(1 + len(self.methods), f"starting at {size} px")
        cases: dict[str, tuple] = {BACKBONE: (prepare_backbone, self.choice, exact, inputs)}
        for method in self.methods:
            cases[method.name] = (prepare, method, inputs)
            why = method.reason or self._room(inputs)
            if why:
                reasons[method.name] = why
        for name, (make, *arguments) in cases.items():
            if name not in reasons:
                try:
                    if self.device.type == "cpu":
                        runners[name] = stack.enter_context(Apart(make, *arguments))
                    else:
                        case = make(*arguments, str(self.device))
                        runners[name] = Here(case, self.device)
                except OutOfMemory as error:
                    reasons[name] = str(error)
                except (FmupsampleError, RuntimeError) as error:
                    reasons[name] = "out of memory" if is_out_of_memory(error) else _line(error)
            self.progress.advance()
        return runners

    def _room(self, inputs: _Inputs) -> str | None:
        need = 2 * self._output_bytes(inputs)
        free = free_bytes(self.device) if self.device.type != "mps" else None
        if free is not None and need > free:
            return f"its map needs more than the {free / 1e9:.1f} GB that are free"
        return None

    def _output_bytes(self, inputs: _Inputs) -> int:
        return 4 * self.backbone.channels * inputs.pixels[0] * inputs.pixels[1]

    def _add(
        self,
        size: int,
        inputs: _Inputs,
        timed: dict[str, dict],
        peaks: dict[str, int],
        reasons: dict[str, str],
    ) -> None:
        base = timed.get(BACKBONE, {}).get("median_s")
        missing = {"median_s": None, "quartiles_s": None, "rounds": 0}
        shared = {"size": size, "pixels": list(inputs.pixels), "cells": list(inputs.cells)}

        def row(name: str, facts: dict[str, Any]) -> None:
            own = timed.get(name, missing)
            times = None if base is None or own["median_s"] is None else own["median_s"] / base
            why = reasons.get(name) or (None if own["rounds"] else "interrupted")
            self.report.rows.append(
                shared
                | {"upsampler": name, **facts, **own}
                | {"peak_bytes": peaks.get(name), "of_backbone": times, "reason": why}
            )

        count = sum(p.numel() for p in self.backbone.parameters())
        row(BACKBONE, _facts(None, "trained", count, None, None))
        for method in self.methods:
            row(method.name, self._described(method, inputs, reasons))

    def _described(
        self, method: Method, inputs: _Inputs, reasons: dict[str, str]
    ) -> dict[str, Any]:
        """What is known of a method without measuring it."""
        if method.reason:
            return _facts(method.row.name, method.weights, None, None, None)
        try:
            upsampler = method.build()
            price = upsampler.cost(self.backbone.channels, inputs.cells, inputs.pixels)
        except FmupsampleError as error:
            reasons.setdefault(method.name, str(error))
            return _facts(method.row.name, method.weights, None, None, None)
        count = sum(p.numel() for p in upsampler.parameters())
        output = self._output_bytes(inputs)
        return _facts(method.row.name, method.weights, count, price.macs, output)


def _facts(
    method: str | None, weights: str, parameters: int | None, macs: int | None, output: int | None
) -> dict[str, Any]:
    return {
        "method": method,
        "weights": weights,
        "parameters": parameters,
        "macs": macs,
        "output_bytes": output,
    }


def default_pictures() -> list[Source]:
    """The photographs beside the package in a checkout; none (drawn ones) elsewhere."""
    return find_images([_EXAMPLES]) if _EXAMPLES.is_dir() else []


def drawn_picture(side: int) -> np.ndarray:
    """uint8 ``[H, W, 3]``: discs of different colours on a gradient, with a little noise."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    picture = np.stack([90 + 80 * x, 110 + 60 * y, 150 - 70 * x * y], -1)
    for _ in range(12):
        cx, cy, radius = *random.uniform(0, 1, 2), random.uniform(0.05, 0.2)
        picture[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] = random.uniform(20, 235, 3)
    noisy = picture + random.normal(0, 4, picture.shape)
    return noisy.clip(0, 255).astype(np.uint8)


def _backend(device: torch.device) -> str:
    name = implementation(device).__name__.rpartition(".")[2]
    return "torch" if name == "plain" else name


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
