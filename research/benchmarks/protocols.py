"""The two protocols of the quality benchmark: one probe for all of CamVid, one for each of DAVIS's
sequences."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from statistics import mean

import torch

import tables
from contenders import Contender
from fmupsample.backbones import load_backbone
from fmupsample.device import resolve_device
from fmupsample.images.size import ImageSize
from fmupsample.labels.classes import ClassTable
from fmupsample.labels.dataset import read_pair
from fmupsample.labels.layouts import Pair
from fmupsample.pipeline import Pipeline
from fmupsample.probing import (
    BoundaryF,
    Confusion,
    Example,
    FitOptions,
    LinearProbe,
    Segmentation,
    Store,
    encode,
    fit_probe,
    predict,
)
from fmupsample.probing.cache import kernels_prefix
from fmupsample.progress import Progress
from fmupsample.upsamplers import Nearest, Upsampler, load_upsampler
from labelled import CAMVID, DAVIS, camvid, davis


class Bench:
    """What all cells share: the backbone, the cached encodings, and how probes are fitted."""

    def __init__(self, args: argparse.Namespace, progress: Progress) -> None:
        self.args, self.progress = args, progress
        self.device = resolve_device(args.device)
        self.backbone = load_backbone(
            args.backbone, layer=args.layer, weights=args.backbone_weights
        )
        self.store = Store(0 if args.cache else int(args.memory * 1e9), args.cache)
        pixels = args.pixels or None
        self.options = FitOptions(tuple(args.rates), epochs=args.epochs, pixels=pixels)
        # One frame says little of the directions in which its features hardly vary: whitening would
        # make them as important as the others.
        self.shot_options = FitOptions(
            (args.shot_rate,), steps=args.shot_steps, pixels=pixels, whiten=0.0
        )
        self.nearest = load_upsampler(self.backbone, Nearest.name)

    def settings(self) -> dict:
        """Everything that decides the numbers and is the same for all cells."""
        args, backbone = self.args, self.backbone

        def seedless(options: FitOptions) -> dict:
            return {k: v for k, v in options.to_dict().items() if k != "seed"}

        return {
            "backbone": backbone.name,
            "backbone_fingerprint": backbone.fingerprint,
            "layer": backbone.layer,
            "image_size": args.image_size,
            "camvid_limits": args.limits,
            "davis_sequences": args.sequences,
            "camvid_probe": seedless(self.options),
            "davis_probe": seedless(self.shot_options),
            "band": args.band,
            "tolerance": args.tolerance,
        }

    def pipeline(self, upsampler: Upsampler) -> Pipeline:
        size = ImageSize(short=self.args.image_size)
        return Pipeline(self.backbone, upsampler, image_size=size, device=self.device)

    def examples(
        self, upsampler: Upsampler, pairs: list[Pair], table: ClassTable, *, flips: bool
    ) -> list[Example]:
        """Pictures with their labels, encoded for ``upsampler``."""
        encoded = encode(
            self.pipeline(upsampler),
            [pair.source for pair in pairs],
            self.store,
            flips=flips,
            progress=self.progress,
        )
        labels = (torch.from_numpy(read_pair(pair, table)) for pair in pairs)
        return [Example(*both) for both in zip(encoded, labels, strict=True)]

    def forget(self, upsampler: Upsampler) -> None:
        """Give the room of its kernel weights back: they are by far the largest part."""
        self.store.forget(kernels_prefix(self.pipeline(upsampler)))


class CamVid:
    """One probe for all pictures: fitted on train, judged on val."""

    name = "camvid"

    def __init__(self, bench: Bench) -> None:
        self.bench, args = bench, bench.args
        self.train, self.val = (
            camvid(args.camvid, split, limit)
            for split, limit in zip(("train", "val"), args.limits, strict=True)
        )
        self.preserved: dict[int, LinearProbe] = {}

    def measure(self, contender: Contender, seeds: list[int]) -> Iterator[dict]:
        """A cell for each seed."""
        bench, upsampler = self.bench, contender.upsampler
        train = bench.examples(upsampler, self.train, CAMVID, flips=True)
        val = bench.examples(upsampler, self.val, CAMVID, flips=False)
        for seed in seeds:
            begun = time.perf_counter()
            options = replace(bench.options, seed=seed)
            preserved = self._preserved(seed, options)
            fit = fit_probe(train, upsampler, len(CAMVID), options, bench.progress)
            seconds = {"fit": round(time.perf_counter() - begun, 2)}
            probes = [preserved, fit.probe]
            metrics = [
                Segmentation(len(CAMVID), band=bench.args.band, tolerance=bench.args.tolerance)
                for _ in probes
            ]
            bench.progress.start(len(val), f"judging {contender.name}")
            for example in val:
                size = tuple(example.labels.shape)
                found = predict(probes, upsampler, example.picture.view(), size)
                for metric, classes in zip(metrics, found, strict=True):
                    metric.add(classes, example.labels)
                bench.progress.advance()
            seconds["judge"] = round(time.perf_counter() - begun - seconds["fit"], 2)
            yield {
                "seed": seed,
                "preserved": metrics[0].summary(),
                "fitted": metrics[1].summary(),
                "rate": fit.rate,
                "held_out": {f"{rate:g}": round(miou, 6) for rate, miou in fit.held_out.items()},
                "seconds": seconds,
            }

    def _preserved(self, seed: int, options: FitOptions) -> LinearProbe:
        """The probe on patch features: every pixel teaches the cell it lies in."""
        if seed not in self.preserved:
            bench = self.bench
            train = bench.examples(bench.nearest, self.train, CAMVID, flips=True)
            fit = fit_probe(train, bench.nearest, len(CAMVID), options, bench.progress)
            self.preserved[seed] = fit.probe
        return self.preserved[seed]


class Davis:
    """A probe for each sequence: fitted on its first frame, judged on the others."""

    name = "davis"

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.sequences = davis(bench.args.davis, bench.args.sequences)
        self.preserved: dict[tuple[str, int], LinearProbe] = {}

    def measure(self, contender: Contender, seeds: list[int]) -> Iterator[dict]:
        """A cell for each seed: J and F are means over frames, then over sequences."""
        bench, upsampler = self.bench, contender.upsampler
        encoded = {
            name: bench.examples(upsampler, frames[:1], DAVIS, flips=True)
            + bench.examples(upsampler, frames[1:], DAVIS, flips=False)
            for name, frames in self.sequences.items()
        }
        for seed in seeds:
            begun = time.perf_counter()
            found = {
                name: self._sequence(name, upsampler, examples, seed)
                for name, examples in encoded.items()
            }
            cell = {"seed": seed, "seconds": {"all": round(time.perf_counter() - begun, 2)}}
            for number, probe in enumerate(tables.PROBES):
                scores = {name: both[number] for name, both in found.items()}
                cell[probe] = {
                    "j": round(mean(j for j, _ in scores.values()), 6),
                    "boundary_f": round(mean(f for _, f in scores.values()), 6),
                    "sequences": {
                        name: {"j": round(j, 6), "boundary_f": round(f, 6)}
                        for name, (j, f) in scores.items()
                    },
                }
            yield cell

    def _sequence(
        self, name: str, upsampler: Upsampler, examples: list[Example], seed: int
    ) -> list[tuple[float, float]]:
        """J and F of the object for the preserved and for the fitted probe."""
        bench = self.bench
        options = replace(bench.shot_options, seed=seed)
        if (name, seed) not in self.preserved:
            first = bench.examples(bench.nearest, self.sequences[name][:1], DAVIS, flips=True)
            self.preserved[name, seed] = fit_probe(first, bench.nearest, 2, options).probe
        fit = fit_probe(examples[:1], upsampler, 2, options)
        probes = [self.preserved[name, seed], fit.probe]
        scores: list[list[tuple[float, float]]] = [[] for _ in probes]
        boundary = BoundaryF(2, tolerance=bench.args.tolerance)
        for example in examples[1:]:
            size = tuple(example.labels.shape)
            found = predict(probes, upsampler, example.picture.view(), size)
            for own, classes in zip(scores, found, strict=True):
                confusion = Confusion(2)
                confusion.add(classes, example.labels)
                j, f = confusion.iou()[1].item(), boundary.of(classes, example.labels)[1].item()
                # As in DAVIS: where there is no object and none was found, all is right.
                own.append((1.0 if math.isnan(j) else j, 1.0 if math.isnan(f) else f))
        return [(mean(j for j, _ in own), mean(f for _, f in own)) for own in scores]
