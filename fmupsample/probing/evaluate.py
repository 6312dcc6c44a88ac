"""``probe eval``: how good a probe is on labelled pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fmupsample.errors import FmupsampleError
from fmupsample.images.find import Source
from fmupsample.labels.classes import ClassTable
from fmupsample.labels.dataset import Dataset, read_pair
from fmupsample.labels.depth import read_depth
from fmupsample.labels.layouts import Pair
from fmupsample.pipeline import Pipeline
from fmupsample.probing.metrics import Segmentation
from fmupsample.probing.probe import Probe
from fmupsample.probing.tasks import DepthErrors
from fmupsample.progress import SILENT, Progress


def table_for(probe: Probe, dataset: Dataset) -> ClassTable:
    """How ``dataset`` stores the classes of ``probe``: as its layout does, if it has these."""
    assert probe.classes is not None
    own = dataset.table
    return own if own is not None and own.names == probe.classes.names else probe.classes


def evaluate(
    probe: Probe,
    pipeline: Pipeline,
    dataset: Dataset,
    table: ClassTable,
    *,
    tolerance: float = 0.0075,
    progress: Progress = SILENT,
) -> Segmentation:
    """Count the probe's decisions at the labels' own pixels.

    Args:
        table: what the label files hold, see :func:`table_for`.
        tolerance: of boundary F: pixels, or below 1 a share of the diagonal.

    Raises:
        ImageError: a picture or label file that cannot be used.
    """
    judge = Segmentation(len(table), tolerance=tolerance)
    read = _reader(dataset, lambda pair: torch.from_numpy(read_pair(pair, table)))
    for decided, labels in _decisions(probe, pipeline, dataset, read, progress):
        judge.add(decided, labels)
    return judge


def evaluate_depth(
    probe: Probe,
    pipeline: Pipeline,
    dataset: Dataset,
    scale: float,
    progress: Progress = SILENT,
) -> DepthErrors:
    """The same for depth; ``scale``: units a metre in 16-bit files."""
    errors = DepthErrors(probe.depth_task())
    reader = _reader(dataset, lambda pair: torch.from_numpy(read_depth(pair.labels, scale)))
    for decided, labels in _decisions(probe, pipeline, dataset, reader, progress):
        errors.add(decided, labels)
    return errors


def _reader(dataset: Dataset, read: Callable[[Pair], Tensor]) -> Callable[[Source], Tensor]:
    pairs = {pair.source: pair for pair in dataset.pairs}
    return lambda source: read(pairs[source])


def _decisions(
    probe: Probe,
    pipeline: Pipeline,
    dataset: Dataset,
    read: Callable[[Source], Tensor],
    progress: Progress,
) -> Iterator[tuple[Tensor, Tensor]]:
    """What the probe says of each picture, and its labels."""

    def stop(source: Source, error: FmupsampleError) -> None:
        raise error

    probe.check(pipeline)
    progress.start(len(dataset.pairs), "judging")
    for item in pipeline.items([pair.source for pair in dataset.pairs], on_error=stop):
        labels = read(item.source)
        with torch.no_grad():
            decided = probe.decide(probe.logits(pipeline, item), tuple(labels.shape))
        yield decided.cpu(), labels
        progress.advance()


def report(judge: Segmentation, table: ClassTable) -> dict[str, Any]:
    """The metrics with classes by name, ready for JSON."""
    summary = judge.summary()
    iou, boundary = summary.pop("iou"), summary.pop("boundary_f_per_class")
    return {
        **summary,
        "iou": dict(zip(table.names, iou, strict=True)),
        "boundary_f_per_class": dict(zip(table.names, boundary, strict=True)),
        "boundary_tolerance": judge.boundary.tolerance,
        "band": judge.band,
        "confusion": judge.whole.matrix.tolist(),
    }
