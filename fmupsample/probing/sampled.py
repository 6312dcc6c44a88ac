"""Probes on the upsampled features of any method, whether it is linear in its values or not.

What is linear has kernel weights, and probes are fitted without making the map (``linear.py``). Of
the others the map has to be made: here once per picture, and some pixels of it are kept. To compare
methods of both kinds, all are treated alike: the same pixels, drawn once, and no flips. ::

    comparison = Comparison(pipeline, dataset.pairs, held_out, table)
    row = comparison.measure(upsampler)         # {"preserved": {"miou": ...}, "fitted": ...}
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fmupsample.images.find import Source
from fmupsample.labels.classes import ClassTable
from fmupsample.labels.dataset import read_pair
from fmupsample.labels.matching import Pair
from fmupsample.pipeline import Item, Pipeline
from fmupsample.probing.batches import Example, labels_at
from fmupsample.probing.cache import View, halved
from fmupsample.probing.evaluate import stop
from fmupsample.probing.linear import LinearProbe, stacked
from fmupsample.probing.metrics import IGNORE, Segmentation
from fmupsample.probing.options import options_for
from fmupsample.probing.tasks import classes_at
from fmupsample.probing.training import Fit, fit_probe
from fmupsample.progress import SILENT, Progress
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.classic import Nearest

PIXELS = 4096  # kept of each picture


@dataclass(frozen=True)
class Drawn:
    """Some pixels of a picture, for a probe as a picture of one column."""

    source: Source
    features: Tensor  # [C, n, 1]

    def view(self, flipped: bool = False) -> View:
        weights = torch.ones(()).expand(1, self.features.shape[1], 1)
        return View(self.features, weights)


class Kept(Nearest):
    """The upsampler of such pictures: every pixel is a cell."""

    name: ClassVar[str] = "drawn pixels"


class Comparison:
    """Labelled pictures with their features, on which upsamplers are compared.

    Two probes for each: *preserved*, fitted on the patch features and the same for all, and
    *fitted*, on the upsampled ones.

    Args:
        pipeline: its upsampler does not matter.
        train, judged: pairs to fit the probes on, and to judge them by.
        pixels: drawn of each picture of ``train``, among those with a label.
        rates, epochs: of a fit; by default as :func:`fmupsample.probing.fit.options_for` has them.

    Raises:
        UsageError, ImageError: pictures or labels that cannot be used.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        train: Sequence[Pair],
        judged: Sequence[Pair],
        table: ClassTable,
        *,
        pixels: int = PIXELS,
        seed: int = 0,
        rates: Sequence[float] | None = None,
        epochs: int | None = None,
        progress: Progress = SILENT,
    ) -> None:
        self.pipeline, self.table, self.progress = pipeline, table, progress
        self.options = options_for(
            len(train), rates=rates, epochs=epochs, seed=seed, flips=False, pixels=pixels
        )
        if len(train) == 1:
            self.options = replace(self.options, rates=self.options.rates[:1])
        generator = torch.Generator().manual_seed(seed)
        progress.start(len(train) + len(judged), "features")
        self.train = [
            (item, *_draw(labels, item, pixels, generator)) for item, labels in self._shown(train)
        ]
        self.train = [one for one in self.train if len(one[1])]
        self.judged = list(self._shown(judged))
        self._preserved: LinearProbe | None = None

    def measure(self, upsampler: Upsampler) -> dict[str, Any]:
        """The metrics of both probes with this upsampler, the chosen rate, and seconds.

        Raises:
            FmupsampleError: the fit diverged, or the upsampler cannot do these sizes.
        """
        begun = time.perf_counter()
        if self._preserved is None:
            self._preserved = self._fit(Nearest(), "patch features").probe
        fit = self._fit(upsampler, upsampler.name)
        fitted = time.perf_counter()
        probes = [self._preserved, fit.probe]
        metrics = [Segmentation(len(self.table)) for _ in probes]
        pipeline = self.pipeline.with_upsampler(upsampler)
        self.progress.start(len(self.judged), f"judging {upsampler.name}")
        for item, labels in self.judged:
            found = decide(pipeline, self._restored(item), probes, labels)
            for metric, decided in zip(metrics, found, strict=True):
                metric.add(decided, labels)
            self.progress.advance()
        return {
            "preserved": metrics[0].summary(),
            "fitted": metrics[1].summary(),
            "rate": fit.rate,
            "seconds": {
                "fit": round(fitted - begun, 2),
                "judge": round(time.perf_counter() - fitted, 2),
            },
        }

    def _fit(self, upsampler: Upsampler, label: str) -> Fit:
        pipeline = self.pipeline.with_upsampler(upsampler)
        self.progress.start(len(self.train), f"pixels by {label}")
        examples = []
        for item, pixels, labels in self.train:
            found = halved(features_at(pipeline, self._restored(item), pixels)).cpu()
            examples.append(Example(Drawn(item.source, found.T[..., None]), labels[:, None]))
            self.progress.advance()
        return fit_probe(examples, Kept(), len(self.table), self.options, self.progress)

    def _shown(self, pairs: Sequence[Pair]) -> Iterator[tuple[Item, Tensor]]:
        """Each picture with its features in half precision on the CPU, and its labels."""
        by_source = {pair.source: pair for pair in pairs}
        for item in self.pipeline.items(list(by_source), on_error=stop):
            labels = torch.from_numpy(read_pair(by_source[item.source], self.table))
            small = halved(item.features).cpu()
            yield replace(item, features=small, guidance=torch.empty(0)), labels
            self.progress.advance()

    def _restored(self, item: Item) -> Item:
        features = item.features.to(self.pipeline.device, torch.float32)
        guidance = self.pipeline.guidance(item.canvas, item.window)
        return replace(item, features=features, guidance=guidance)


@torch.no_grad()
def features_at(pipeline: Pipeline, item: Item, pixels: Tensor) -> Tensor:
    """Upsampled features ``[n, C]`` at some pixels of the picture (int64 ``[n]``, row by row).

    The whole map is made only where the upsampler is not linear in its values.
    """
    upsampler = pipeline.upsampler
    assert upsampler is not None
    pixels = pixels.to(pipeline.device)
    if upsampler.linear_in_value:
        kernels = pipeline.kernels(item)
        if kernels.crop == kernels.size:
            width = kernels.size[1]
            within = pixels // width * kernels.weights.shape[3] + pixels % width
            return upsampler.reassemble_at(kernels.weights[0], item.features, within)
    return pipeline.upsample(item).flatten(1)[:, pixels].T


@torch.no_grad()
def decide(
    pipeline: Pipeline, item: Item, probes: Sequence[LinearProbe], labels: Tensor
) -> list[Tensor]:
    """Classes by each probe, int64 at the size of ``labels`` ``[H, W]``, on the CPU."""
    assert pipeline.upsampler is not None
    probe = stacked(probes)
    if pipeline.upsampler.linear_in_value:
        logits = pipeline.upsample(item, value=probe.logits(item.features))
    else:
        logits = probe.logits(pipeline.upsample(item))
    height, width = labels.shape
    return [classes_at(own, (height, width)).cpu() for own in logits.chunk(len(probes))]


def _draw(
    labels: Tensor, item: Item, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Places ``[n]`` of pixels with a label on the map of the picture, and their labels."""
    there = labels_at(labels, item.frame.placed).flatten()
    known = (there != IGNORE).nonzero()[:, 0]
    if len(known) > 0:
        known = known[torch.randint(len(known), (count,), generator=generator)]
    return known, there[known]
