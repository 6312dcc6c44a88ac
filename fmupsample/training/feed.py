"""A frozen backbone as training sees it: its features of crops, and the objective fitted to them.

A run has one of them or, for a head of any backbone, several that take turns.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fmupsample.backbones import Backbone
from fmupsample.device import PRECISIONS, autocast
from fmupsample.errors import TrainingError
from fmupsample.finite import is_finite
from fmupsample.progress import Progress
from fmupsample.training.cache import Features
from fmupsample.training.clusters import Clusters, sample_pixels
from fmupsample.training.config import ENLARGED, TrainConfig
from fmupsample.training.crops import Cropper
from fmupsample.training.distributed import World
from fmupsample.training.objective import Batch, Objective, Scaling
from fmupsample.training.pictures import Loaded, Pictures
from fmupsample.training.regions import split_into_blocks
from fmupsample.training.samples import Sample, Sampler, Samples

_SCALING_SAMPLES = 32
_CLUSTER_SAMPLES, _CLUSTER_PIXELS = 96, 400  # crops, and pixels of each
_HELD_BYTES = 2**28  # memory for features of held-out crops


class Feed:
    """Batches of one backbone.

    Args:
        config: resolved; but for the sizes of crops, which are this backbone's own.
        keep_bytes: memory for features of views that come again; 0: none.

    Attributes:
        sizes: of crops, pixels, in multiples of the backbone's cells.
        objective: with the scaling and the clusters of these features, once :meth:`fit` was called
            or :meth:`load`.
    """

    def __init__(
        self, backbone: Backbone, config: TrainConfig, here: World, keep_bytes: int
    ) -> None:
        self.backbone, self.here = backbone.to(here.device).eval(), here
        self.config = config.resolve(backbone, here.device)
        self.sizes = self.config.image_sizes
        self.cropper = Cropper(backbone.mean, backbone.std, here.device)
        extractor = partial(
            Features,
            backbone,
            self.cropper,
            enlarge=config.enlarge if ENLARGED & set(config.terms) else 0,
            precision=config.precision,
        )
        self.features = extractor(keep_bytes=keep_bytes)
        self.held_features = extractor(keep_bytes=_HELD_BYTES)
        zeros = torch.zeros(backbone.channels, device=here.device)
        self.objective = Objective(
            self.config,
            Scaling(zeros, zeros + 1),
            partial(autocast, here.device, PRECISIONS[config.precision]),
        )

    def size(self, step: int) -> int:
        """Side of the crops of a step."""
        return self.sizes[step % len(self.sizes)]

    def batch(self, samples: Samples, size: int, phase: tuple[int, int], *, held=False) -> Batch:
        """Crops of ``size`` pixels, of training or of ``held`` out pictures, with all that the
        terms need."""
        config, cropper = self.config, self.cropper
        images = cropper.pictures(samples, size)
        low, fine = (self.held_features if held else self.features)(samples, images)
        batch = Batch(images, low, fine, phase=phase)
        if config.regions:
            block = max(1, round(config.region_block * size / low.shape[-1]))
            offsets = cropper.offsets(samples, block)
            batch.regions = split_into_blocks(cropper.regions(samples, size), block, offsets)
        if "masks" in config.terms:
            batch.labels = cropper.labels(samples, size)
            batch.label_weights = cropper.label_weights(samples)
        return batch

    # -- what the objective knows of the features -------------------------------------------------

    def fit(self, pictures: Pictures, sampler: Sampler, progress: Progress) -> None:
        """Fit scaling and, where they are asked for, clusters to the first crops of a run."""
        self.objective.scaling = self._fit_scaling(pictures, sampler)
        if "clusters" in self.config.terms:
            self.objective.clusters = self._fit_clusters(pictures, sampler, progress)

    def state(self) -> dict[str, Any]:
        """What :meth:`fit` found."""
        scaling, clusters = self.objective.scaling, self.objective.clusters
        return {
            "scaling": [scaling.shift, scaling.gain],
            "clusters": [] if clusters is None else clusters.tensors(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state` gave."""
        scaling, clusters = (
            [part.to(self.here.device) for part in state[name]] for name in ("scaling", "clusters")
        )
        self.objective.scaling = Scaling(*scaling)
        self.objective.clusters = Clusters(*clusters) if clusters else None

    def _fit_scaling(self, pictures: Pictures, sampler: Sampler) -> Scaling:
        found = []
        for number in range(min(_SCALING_SAMPLES, max(8, len(pictures)))):
            sample = sampler(number)
            pair = (sample, pictures.load(sample.square))
            found.append(self.features.compute(self.cropper.pictures([pair], self.sizes[0])))
        features = torch.cat(found)
        if not is_finite(features):
            raise TrainingError(
                "the backbone gave NaN or infinity; nothing was trained: try --precision fp32, or "
                "other weights"
            )
        scaling = Scaling.fit(features)
        self.here.share([scaling.shift, scaling.gain])
        return scaling

    def _fit_clusters(self, pictures: Pictures, sampler: Sampler, progress: Progress) -> Clusters:
        config, scaling, size = self.config, self.objective.scaling, self.sizes[0]
        generator = torch.Generator().manual_seed(config.seed)
        count = max(8, min(_CLUSTER_SAMPLES, len(pictures)))
        progress.start(count, "clusters of fine features")
        found = []
        for number in range(count):
            sample = sampler(number)
            pair = (sample, pictures.load(sample.square))
            low, fine = self.features([pair], self.cropper.pictures([pair], size))
            maps = scaling(fine)[0], scaling(low)[0]
            found.append(sample_pixels(*maps, (size, size), _CLUSTER_PIXELS, generator))
            progress.advance()
        fine, low = (torch.cat(part) for part in zip(*found, strict=True))
        clusters = Clusters.fit(fine, low, config.clusters, config.seed)
        self.here.share(clusters.tensors())
        return clusters

    # -- to look at -------------------------------------------------------------------------------

    def view(self, loaded: Loaded, side: int) -> tuple[Any, Tensor, Tensor]:
        """A whole square of about ``side`` pixels: as uint8 ``[S, S, 3]``, as the backbone takes it
        ``[1, 3, S, S]``, and its features."""
        multiple, fixed = self.backbone.size_multiple[0], self.backbone.fixed_size
        size = fixed[0] if fixed else max(side // multiple, 1) * multiple
        whole = Sample(0, 0, 0.0, 0.0, 1.0, False, (0, 0))
        image = self.cropper.pictures([(whole, loaded)], size)
        shown = (image[0] * self.cropper.std + self.cropper.mean).clamp(0, 1) * 255
        pixels = shown.round().byte().permute(1, 2, 0).cpu().numpy()
        return pixels, image, self.held_features.compute(image)
