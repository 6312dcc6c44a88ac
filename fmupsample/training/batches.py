"""Samples -> the tensors that the objective compares."""

from __future__ import annotations

from collections.abc import Sequence

from fmupsample.training.cache import Features
from fmupsample.training.config import TrainConfig
from fmupsample.training.crops import Cropper, pixel_shifts
from fmupsample.training.data import Loaded, Sample
from fmupsample.training.objective import LABELLED, Batch, split_into_blocks


def make_batch(
    samples: Sequence[tuple[Sample, Loaded]],
    size: int,
    phase: tuple[int, int],
    config: TrainConfig,
    cropper: Cropper,
    features: Features,
) -> Batch:
    """Crops of ``size`` pixels with all that the terms of ``config`` need."""
    images = cropper.pictures(samples, size)
    low, fine, shifted = features(samples, images)
    batch = Batch(image=images, low=low, fine=fine, phase=phase)
    if shifted is not None:
        batch.shifted = shifted
        batch.shifts = pixel_shifts([sample for sample, _ in samples], size, low.shape[-2:])
    if config.regions:
        block = max(1, round(config.region_block * size / low.shape[-1]))
        offsets = cropper.offsets(samples, block)
        batch.regions = split_into_blocks(cropper.regions(samples, size), block, offsets)
    if "augment" in config.terms:
        batch.varied = cropper.pictures(samples, size, "varied")
    if LABELLED & set(config.terms):
        batch.labels = cropper.labels(samples, size)
        batch.label_weights = cropper.label_weights(samples)
    return batch
