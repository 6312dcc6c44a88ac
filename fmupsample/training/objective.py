"""What a head is trained for: named terms.

All but ``masks`` take features with every channel scaled to mean 0 and variance 1 over the data.

* ``clusters``: a linear classifier of low-resolution features, fitted before and fixed, should say
  at every pixel in which cluster the features of the enlarged crop are (:mod:`.clusters`). Those
  are first drawn, by ``cluster_share``, to the mean of what is near in the picture's own region
  (:mod:`.regions`), which says where the edges are: features of the enlarged crop are coarse too.
* ``crops``: upsampled features of a crop, averaged over the cells of a finer grid, should be what
  the backbone says about the same crop enlarged (the idea of FeatUp, Fu et al. 2024, in the
  single-view form of JAFAR, Couairon et al. 2025). It is best served by mixing neighbours, which
  costs what a linear probe tells apart.
* ``masks``: every pixel should take its features from cells of its own segment, in masks of any
  classes that come with the pictures (:mod:`.masks`). It looks at kernel weights, not at features.

Kernel weights sum to 1, so scaling and classifiers are applied to the small maps and never to the
large one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fmupsample.training.clusters import Clusters
from fmupsample.training.config import TrainConfig
from fmupsample.training.masks import mask_loss, segment_shares, segments
from fmupsample.upsamplers.base import Upsampler

_MSE = 0.5  # what the mean squared error counts beside 1 - cos in ``crops``

# A map larger than this is made in slices of channels, each made again for the gradient.
_MAP_BYTES = {"cpu": 256 << 20}
_MAP_BYTES_ACCELERATOR = 2 << 30


@dataclass(frozen=True)
class Scaling:
    """An affine map per channel, ``(x - shift) * gain``, both ``[C]``."""

    shift: Tensor
    gain: Tensor

    @classmethod
    def fit(cls, features: Tensor) -> Scaling:
        """To mean 0 and variance 1 over features ``[N, C, h, w]``: a few channels of a ViT are 100
        times larger than the rest. Channels that do not vary are only shifted."""
        flat = features.transpose(0, 1).flatten(1).double()
        shift, spread = flat.mean(1), flat.std(1, correction=0)
        gain = torch.where(spread > 1e-6 * flat.abs().amax(1), 1 / spread, torch.ones_like(spread))
        return cls(shift.to(features.dtype), gain.to(features.dtype))

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.shift[:, None, None]) * self.gain[:, None, None]


@dataclass
class Batch:
    """What one step is made from; ``h x w`` cells, ``H x W`` pixels.

    Attributes:
        image: ``[B, 3, H, W]``, the crops, normalised for the backbone.
        low: ``[B, C, h, w]``, their features.
        fine: ``[B, C, e h, e w]``, features of the crops enlarged e times.
        regions: int64 ``[B, H, W]``, numbers unique over the batch.
        labels: int64 ``[B, H, W]``; 255 where there are none.
        label_weights: ``[B]``, what each crop's labels count in ``masks``.
        phase: first row and column of the pixels that are looked at where not all are.
    """

    image: Tensor
    low: Tensor
    fine: Tensor | None = None
    regions: Tensor | None = None
    labels: Tensor | None = None
    label_weights: Tensor | None = None
    phase: tuple[int, int] = (0, 0)


class Objective:
    """The terms of a configuration.

    Args:
        scaling: of the features.
        arithmetic: gives the context in which the upsampler computes its kernels (autocast).
    """

    def __init__(
        self,
        config: TrainConfig,
        scaling: Scaling,
        arithmetic: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.config = config
        self.scaling = scaling
        self.arithmetic = arithmetic
        self.clusters: Clusters | None = None  # for the term of that name
        self.map_bytes: int | None = None  # for tests: instead of what suits the device

    def __call__(self, upsampler: Upsampler, batch: Batch) -> dict[str, Tensor]:
        """Each term of the configuration, a scalar: the mean over pictures and positions."""
        with self.arithmetic():
            up = _Upsampled(upsampler, batch, self.scaling)
        terms = {"clusters": self._clusters, "crops": self._crops, "masks": self._masks}
        return {name: terms[name](up, batch) for name in self.config.terms}

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """The weighted sum of what :meth:`__call__` gave."""
        return sum(weight * terms[name] for name, weight in self.config.terms.items())

    def _clusters(self, up: _Upsampled, batch: Batch) -> Tensor:
        """Cross-entropy of the upsampled logits and the clusters, at the thinned pixels."""
        (y, x), step = batch.phase, self.config.pixel_stride
        thinned = (..., slice(y, None, step), slice(x, None, step))
        members = self.clusters.members(
            self.scaling(batch.fine),
            tuple(batch.image.shape[-2:]),
            batch.phase,
            step,
            None if batch.regions is None else batch.regions[thinned],
            self.config.cluster_share,
        )
        return F.cross_entropy(up.classified(self.clusters.logits)[thinned], members)

    def _crops(self, up: _Upsampled, batch: Batch) -> Tensor:
        """Distance of averages from the features of the enlarged crop."""
        limit = self.map_bytes or _MAP_BYTES.get(batch.low.device.type, _MAP_BYTES_ACCELERATOR)
        each = batch.image[:, 0].numel() * batch.low.element_size()
        target = self.scaling(batch.fine)
        means = up.averaged(target.shape[-2:], max(1, limit // each))
        cosine = F.cosine_similarity(means, target)
        return (1 - cosine + _MSE * (means - target).square().mean(1)).mean()

    def _masks(self, up: _Upsampled, batch: Batch) -> Tensor:
        """How much of each pixel's weights is on cells of its own segment."""
        numbers = segments(batch.labels)
        shares = segment_shares(numbers, tuple(up.low.shape[-2:]), self.config.mask_widen)
        return mask_loss(up.upsampler, up.weights, numbers, shares, batch.label_weights)[0]


class _Upsampled:
    """The scaled features of a batch, upsampled: by kernel weights where the upsampler has some,
    else as a whole map."""

    def __init__(self, upsampler: Upsampler, batch: Batch, scaling: Scaling) -> None:
        self.upsampler, self.low = upsampler, scaling(batch.low)
        self.weights = self.map = None
        if upsampler.linear_in_value:
            self.weights = upsampler.kernels(batch.low, batch.image)
        else:
            self.map = scaling(upsampler(batch.low, batch.image).to(batch.low.dtype))

    def classified(self, classifier: Callable[[Tensor], Tensor]) -> Tensor:
        """An affine classifier's logits ``[B, K, H, W]``: it commutes with reassembly."""
        if self.weights is None:
            return classifier(self.map)
        return self.upsampler.reassemble(self.weights, classifier(self.low))

    def averaged(self, grid: tuple[int, int], channels: int) -> Tensor:
        """Means ``[B, C, gh, gw]`` over the cells of a grid, made ``channels`` at a time."""
        if self.weights is None:
            return F.adaptive_avg_pool2d(self.map, grid)
        if channels >= self.low.shape[1]:
            return self._average(self.low, grid)
        parts = self.low.split(channels, 1)
        return torch.cat(
            [checkpoint(self._average, p, grid, use_reentrant=False) for p in parts], 1
        )

    def _average(self, values: Tensor, grid: tuple[int, int]) -> Tensor:
        return F.adaptive_avg_pool2d(self.upsampler.reassemble(self.weights, values), grid)
