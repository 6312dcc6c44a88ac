"""``probe eval``: how good a probe is on labelled pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fmupsample.errors import FmupsampleError
from fmupsample.images.find import Source
from fmupsample.labels.classes import ClassTable
from fmupsample.labels.dataset import Dataset, read_pair
from fmupsample.labels.depth import read_depth
from fmupsample.labels.matching import Pair
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
    _add_all(judge, probe, pipeline, dataset.pairs, lambda p: read_pair(p, table), progress)
    return judge


def evaluate_depth(
    probe: Probe,
    pipeline: Pipeline,
    dataset: Dataset,
    scale: float,
    progress: Progress = SILENT,
) -> DepthErrors:
    """The same for depth; ``scale``: units a metre in 16-bit files."""
    judge = DepthErrors(probe.depth_task())
    _add_all(judge, probe, pipeline, dataset.pairs, lambda p: read_depth(p.labels, scale), progress)
    return judge


@torch.no_grad()
def _add_all(
    judge: Segmentation | DepthErrors,
    probe: Probe,
    pipeline: Pipeline,
    pairs: Sequence[Pair],
    read: Callable[[Pair], np.ndarray],
    progress: Progress,
) -> None:
    """Tell ``judge`` what the probe says of each picture, and its labels."""
    probe.check(pipeline)
    progress.start(len(pairs), "judging")
    by_source = {pair.source: pair for pair in pairs}
    for item in pipeline.items(list(by_source), on_error=stop):
        labels = torch.from_numpy(read(by_source[item.source]))
        decided = probe.decide(probe.logits(pipeline, item), tuple(labels.shape))
        judge.add(decided.cpu(), labels)
        progress.advance()


def stop(source: Source, error: FmupsampleError) -> None:
    """For a pipeline that is to leave out no picture."""
    raise error


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
