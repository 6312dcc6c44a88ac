"""What a head is trained for: named terms.

All take features with every channel scaled, by default to mean 0 and variance 1 over the data, and
all but three (``clusters``, ``masks``, ``task``) are the distance of two maps of them.

* ``clusters``: a linear classifier of low-resolution features, fitted before and fixed, should say
  at every pixel in which cluster the features of the enlarged crop are (:mod:`.clusters`), each
  first drawn to the mean of its region (see ``regions``) by ``cluster_share``. Small clusters count
  by ``cluster_balance``.
* ``crops``: upsampled features of a crop, averaged over the cells of a finer grid, should be what
  the backbone says about the same crop enlarged (the idea of FeatUp, Fu et al. 2024, in the
  single-view form of JAFAR, Couairon et al. 2025).
* ``regions``: every pixel should carry the mean feature of what is near it in the picture's own
  region: of its region within a block of a few cells, the blocks laid anew at random each time. The
  targets of ``crops`` are themselves coarse; this term says where the edges are. LoftUp (Huang et
  al. 2025) does the like with masks of a large model. Without the blocks a pixel's target would
  lie out of reach of its neighbours, and the nearest thing within reach, the mean of them all, is
  a blur.
* ``area``: averaged over each low-resolution cell, upsampled features should be the cell's own
  (AnyUp, Wimmer et al. 2025): upsampling says where within a cell things are, not what is there.
* ``preserve``: at the centre of a cell, upsampled features should be the cell's own. With ``area``
  it keeps classifiers working that were fitted on the low-resolution features.
* ``shifts``: averaged over the cells of a view of the crop that is shifted by a part of a cell, at
  random, upsampled features should be what the backbone says about that view. Such targets lie
  between the cells, at the scale that the backbone knows: nothing is enlarged.
* ``augment``: the same features under the guidance of a picture with changed colours should give
  the same map (AnyUp).
* ``masks``: every pixel should take its features from cells of its own segment, in masks of any
  classes that come with the pictures (:mod:`.masks`). It looks at kernel weights, not at features.
* ``task``: cross-entropy of a linear probe, trained along with the head, on labelled pictures.

Kernel weights sum to 1, so the scaling is applied to the small maps and never to the large one. Of
that, no more than a slice of the channels exists at a time where memory would not hold all: each
slice leaves its share of the inner products that the distances are made of, and is made again for
the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fmupsample.ops.grid import interpolation_matrix, plan_axis
from fmupsample.training.clusters import Clusters
from fmupsample.training.masks import IGNORED, mask_loss, segment_shares, segments
from fmupsample.upsamplers.base import Upsampler

if TYPE_CHECKING:
    from fmupsample.training.config import TrainConfig

TERMS = ("clusters", "crops", "regions", "area", "preserve", "shifts", "augment", "masks", "task")
SCALINGS = ("standard", "minmax", "none")

# Terms that are not the distance of two feature maps.
APART = frozenset({"clusters", "masks", "task"})

# Terms that look at labels.
LABELLED = frozenset({"masks", "task"})

# Terms whose targets come from the enlarged crop.
ENLARGED = frozenset({"clusters", "crops", "regions"})

# A map larger than this is worked on in slices of channels.
_MAP_BYTES = {"cpu": 256 << 20}
_MAP_BYTES_ACCELERATOR = 2 << 30


@dataclass(frozen=True)
class Scaling:
    """An affine map per channel, ``(x - shift) * gain``, both ``[C]``."""

    shift: Tensor
    gain: Tensor

    @classmethod
    def fit(cls, features: Tensor, kind: str) -> Scaling:
        """From some features ``[N, C, h, w]``: ``"standard"``, ``"minmax"`` (0..1) or ``"none"``.

        Channels that do not vary are only shifted.
        """
        flat = features.transpose(0, 1).flatten(1).double()
        shift, gain = torch.zeros_like(flat[:, 0]), torch.ones_like(flat[:, 0])
        if kind == "standard":
            shift, spread = flat.mean(1), flat.std(1, correction=0)
        elif kind == "minmax":
            shift, spread = flat.amin(1), flat.amax(1) - flat.amin(1)
        if kind != "none":
            gain = torch.where(spread > 1e-6 * flat.abs().amax(1), 1 / spread, gain)
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
        regions: int64 ``[B, H, W]``, numbers unique over the batch and without gaps, in the order
            of the pictures.
        varied: ``[B, 3, H, W]``, the crops with other colours.
        labels: int64 ``[B, H, W]``; 255 where there are none.
        label_weights: ``[B]``, what each crop's labels count in ``masks``.
        shifted: ``[B, C, h, w]``, features of the crops shifted by ``shifts``.
        shifts: pixels, down and right, of each crop; at most half a cell.
        phase: first row and column of the pixels that are looked at where not all are.
    """

    image: Tensor
    low: Tensor
    fine: Tensor | None = None
    regions: Tensor | None = None
    varied: Tensor | None = None
    labels: Tensor | None = None
    label_weights: Tensor | None = None
    shifted: Tensor | None = None
    shifts: Sequence[tuple[int, int]] = ()
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

    def __call__(
        self, upsampler: Upsampler, batch: Batch, probe: nn.Module | None = None
    ) -> dict[str, Tensor]:
        """Each term of the configuration, a scalar: the mean over pictures and positions.

        Args:
            probe: a 1x1 convolution ``[B, C, ...]`` -> ``[B, classes, ...]`` for ``task``.
        """
        job = _Job(self, upsampler, batch)
        compared = [name for name in self.config.terms if name not in APART]
        found = {}
        if compared:
            sums = job.sums(compared)
            found = {name: self._distance(sums[name], batch.low.shape[1]) for name in compared}
        if "clusters" in self.config.terms:
            found["clusters"] = job.clusters(self.clusters)
        if "masks" in self.config.terms:
            found["masks"] = job.masks()
        if "task" in self.config.terms:
            found["task"] = job.task(probe)
        return {name: found[name] for name in self.config.terms}

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """The weighted sum of what :meth:`__call__` gave."""
        return sum(weight * terms[name] for name, weight in self.config.terms.items())

    @staticmethod
    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        """Of logits ``[B, classes, H, W]``: the mean over pictures of their labelled pixels'."""
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
        counts = (labels != IGNORED).sum((1, 2)).clamp_min(1)
        return (loss.sum((1, 2)) / counts).mean()

    def _distance(self, sums: Tensor, channels: int) -> Tensor:
        """From the three inner products of predictions and targets, ``[3, B, ...]``."""
        both, predicted, target = sums
        squares = (predicted - 2 * both + target).clamp_min(0) / channels
        cosine = both * (predicted * target).clamp_min(1e-12).rsqrt()
        return (self.config.cosine * (1 - cosine) + self.config.mse * squares).mean()


class _Products(torch.autograd.Function):
    """``(p.t, p.p, t.t)`` over channels: ``[B, c, ...]`` -> ``[3, B, ...]``; t is constant."""

    @staticmethod
    def forward(ctx, predicted: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(predicted, target)
        pairs = ((predicted, target), (predicted, predicted), (target, target))
        return torch.stack([(x * y).sum(1) for x, y in pairs])

    @staticmethod
    def backward(ctx, grad: Tensor):
        predicted, target = ctx.saved_tensors
        return (target * grad[0, :, None]).addcmul_(predicted, 2 * grad[1, :, None]), None


class _Job:
    """One evaluation of the objective."""

    def __init__(self, objective: Objective, upsampler: Upsampler, batch: Batch) -> None:
        self.config, self.scaling = objective.config, objective.scaling
        self.upsampler, self.batch = upsampler, batch
        self.low = self.scaling(batch.low)
        self.fine = None if batch.fine is None else self.scaling(batch.fine)
        self.shifted = None if batch.shifted is None else self.scaling(batch.shifted)
        self.size = batch.image.shape[-2:]
        self.weights = self.varied = self.map = self.varied_map = None
        varied = batch.varied if "augment" in self.config.terms else None
        with objective.arithmetic():
            if upsampler.linear_in_value:
                self.weights = upsampler.kernels(batch.low, batch.image)
                if varied is not None:
                    self.varied = upsampler.kernels(batch.low, varied)
            else:
                self.map = upsampler(batch.low, batch.image)
                if varied is not None:
                    self.varied_map = upsampler(batch.low, varied)
        if self.map is not None:
            self.map = self.scaling(self.map.to(batch.low.dtype))
        if self.varied_map is not None:
            self.varied_map = self.scaling(self.varied_map.to(batch.low.dtype))
        self.region_means = None
        if "regions" in self.config.terms:
            self.region_means = means_of_regions(batch.regions, self.low, self.fine)
        device = batch.low.device.type
        self.map_bytes = objective.map_bytes or _MAP_BYTES.get(device, _MAP_BYTES_ACCELERATOR)

    def sums(self, names: list[str]) -> dict[str, Tensor]:
        """The inner products of each term's predictions and targets, summed over the channels."""
        batch, channels = self.low.shape[:2]
        each = batch * self.size[0] * self.size[1] * self.low.element_size()
        step = max(1, min(channels, self.map_bytes // each))
        parts = []
        for c0 in range(0, channels, step):
            slice_ = slice(c0, min(c0 + step, channels))
            if step == channels or self.weights is None or not torch.is_grad_enabled():
                parts.append(self._slice(slice_, names))
            else:
                parts.append(checkpoint(self._slice, slice_, names, use_reentrant=False))
        return {name: sum(part[i] for part in parts) for i, name in enumerate(names)}

    def _slice(self, c: slice, names: list[str]) -> list[Tensor]:
        full = self._full(self.weights, self.map, c)
        return [_Products.apply(*getattr(self, f"_{name}")(full, c)) for name in names]

    def _full(self, weights: Tensor | None, whole: Tensor | None, c: slice) -> Tensor:
        if weights is None:
            return whole[:, c]
        return self.upsampler.reassemble(weights, self.low[:, c])

    def _thinned(self, full: Tensor) -> Tensor:
        (y, x), step = self.batch.phase, self.config.pixel_stride
        return full[..., y::step, x::step]

    # -- the terms: (predictions, targets), both [B, c, ...] --------------------------------------

    def _crops(self, full: Tensor, c: slice) -> tuple[Tensor, Tensor]:
        return average(full, self.fine.shape[-2:]), self.fine[:, c]

    def _area(self, full: Tensor, c: slice) -> tuple[Tensor, Tensor]:
        return average(full, self.low.shape[-2:]), self.low[:, c]

    def _preserve(self, full: Tensor, c: slice) -> tuple[Tensor, Tensor]:
        return at_centres(full, self.low.shape[-2:]), self.low[:, c]

    def _shifts(self, full: Tensor, c: slice) -> tuple[Tensor, Tensor]:
        predicted, target = [], []
        for one, seen, shift in zip(full, self.shifted[:, c], self.batch.shifts, strict=True):
            cells = [
                whole_cells(n, shift_) for n, shift_ in zip(seen.shape[-2:], shift, strict=True)
            ]
            predicted.append(average_shifted(one, seen.shape[-2:], shift))
            target.append(seen[:, cells[0], cells[1]])
        return torch.stack(predicted), torch.stack(target)

    def _regions(self, full: Tensor, c: slice) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            number = self._thinned(self.batch.regions)  # [B, H', W']
            # Channels first: [c, B H' W'] is read off a small table along its rows.
            means = self.region_means[:, c].T.contiguous().index_select(1, number.flatten())
            means = means.unflatten(1, number.shape).transpose(0, 1)  # [B, c, H', W']
            plain = self._interpolated(self.low[:, c])
            if self.fine is not None:
                plain = plain.add_(self._interpolated(self.fine[:, c])).mul_(0.5)
            target = plain.lerp_(means, self.config.region_share)
        return self._thinned(full), target

    def _augment(self, full: Tensor, c: slice) -> tuple[Tensor, Tensor]:
        varied = self._full(self.varied, self.varied_map, c)
        return self._thinned(varied), self._thinned(full).detach()

    def _interpolated(self, x: Tensor) -> Tensor:
        """``x`` upsampled bilinearly, at the thinned pixels."""
        (y0, x0), step = self.batch.phase, self.config.pixel_stride
        uy = interpolation_matrix(x.shape[2], self.size[0])[y0::step].to(x)
        ux = interpolation_matrix(x.shape[3], self.size[1])[x0::step].to(x)
        return uy @ x @ ux.T

    def clusters(self, clusters: Clusters) -> Tensor:
        """Cross-entropy of the upsampled logits and the clusters, at the thinned pixels."""
        regions = self.batch.regions
        members = clusters.members(
            self.fine,
            self.size,
            self.batch.phase,
            self.config.pixel_stride,
            None if regions is None else self._thinned(regions),
            self.config.cluster_share,
        )
        logits = self._thinned(self._logits(clusters.logits))
        each = F.cross_entropy(logits, members, reduction="none")
        return (each * rarity(members, self.config.cluster_balance)).mean()

    def masks(self) -> Tensor:
        """How much of each pixel's weights is on cells of its own segment."""
        batch = self.batch
        numbers = segments(batch.labels)
        shares = segment_shares(numbers, tuple(self.low.shape[-2:]), self.config.mask_widen)
        return mask_loss(self.upsampler, self.weights, numbers, shares, batch.label_weights)[0]

    def task(self, probe: nn.Module) -> Tensor:
        """Cross-entropy of the probe's upsampled logits, each picture's labelled pixels alike."""
        return Objective.cross_entropy(self._logits(probe), self.batch.labels)

    def _logits(self, classifier: Callable[[Tensor], Tensor]) -> Tensor:
        """Of upsampled features; an affine classifier commutes with reassembly."""
        if self.weights is None:
            return classifier(self.map)
        return self.upsampler.reassemble(self.weights, classifier(self.low))


def rarity(members: Tensor, exponent: float) -> Tensor:
    """Weights ``[B, H, W]`` of pixels by the share that their class has of their picture.

    ``share ** -exponent``, scaled to a mean of 1 in each picture: 0 counts pixels, 1 classes.
    """
    found = []
    for own in members:
        counts = torch.bincount(own.flatten())
        weight = counts.clamp_min(1).float() ** -exponent
        found.append(weight[own] / (weight * counts).sum() * own.numel())
    return torch.stack(found)


def average(full: Tensor, grid: tuple[int, int]) -> Tensor:
    """Means ``[B, C, gh, gw]`` of ``[B, C, H, W]`` over the cells of a grid."""
    (height, width), (gh, gw) = full.shape[-2:], grid
    if height % gh or width % gw:
        return F.adaptive_avg_pool2d(full, grid)
    return F.avg_pool2d(full, (height // gh, width // gw))


def whole_cells(cells: int, shift: int) -> slice:
    """Those cells of an axis of a shifted view that show nothing beyond the image's border: all but
    the last, or the first."""
    return slice(1, cells) if shift < 0 else slice(0, cells - 1)


def average_shifted(full: Tensor, grid: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Means of ``[C, H, W]`` over the :func:`whole_cells` of a view with this grid and shift.

    Pixels that lie in two cells count in both by their share.
    """
    axes = [
        (Fraction(pixels, cells), whole_cells(cells, own).start * Fraction(pixels, cells) + own)
        for pixels, cells, own in zip(full.shape[-2:], grid, shift, strict=True)
    ]
    count = tuple(cells - 1 for cells in grid)
    if all(side.denominator == 1 for side, _ in axes):
        parts = [
            slice(int(start), int(start + n * side))
            for n, (side, start) in zip(count, axes, strict=True)
        ]
        return average(full[None, :, parts[0], parts[1]], count)[0]
    down, across = (
        _shares(pixels, n, side, start).to(full)
        for pixels, n, (side, start) in zip(full.shape[-2:], count, axes, strict=True)
    )
    return down @ full @ across.T


def _shares(pixels: int, cells: int, side: Fraction, start: Fraction) -> Tensor:
    """``[cells, pixels]``: what part of each cell each pixel is."""
    edges = float(start) + float(side) * torch.arange(cells + 1, dtype=torch.float64)
    pixel = torch.arange(pixels, dtype=torch.float64)
    last = torch.minimum(edges[1:, None], pixel + 1)
    first = torch.maximum(edges[:-1, None], pixel)
    return (last - first).clamp_min(0) / float(side)


def at_centres(full: Tensor, grid: tuple[int, int]) -> Tensor:
    """``[B, C, H, W]`` at the centres of the cells of a grid: the mean of the nearest pixels."""
    for dim, cells in zip((2, 3), grid, strict=True):
        pixels = full.shape[dim]
        # The centre of cell i lies at pixel coordinate (2 i + 1) N / (2 n) - 1/2.
        twice = (2 * torch.arange(cells) + 1) * pixels - cells
        low = torch.div(twice, 2 * cells, rounding_mode="floor")
        high = -torch.div(-twice, 2 * cells, rounding_mode="floor")
        low, high = low.to(full.device), high.to(full.device)
        full = 0.5 * (full.index_select(dim, low) + full.index_select(dim, high))
    return full


def split_into_blocks(regions: Tensor, block: int, offsets: Tensor) -> Tensor:
    """Cut the regions of pictures along a grid of ``block`` pixels.

    Args:
        regions: integers ``[B, H, W]``.
        offsets: int64 ``[B, 2]``, where each picture's grid begins, rows and columns.

    Returns:
        int64 ``[B, H, W]``; numbers are unique over the batch and without gaps, in its order.
    """
    batch, height, width = regions.shape
    rows = (torch.arange(height, device=regions.device) + offsets[:, :1]) // block  # [B, H]
    columns = (torch.arange(width, device=regions.device) + offsets[:, 1:]) // block
    across = width // block + 2
    blocks = rows[:, :, None] * across + columns[:, None, :]
    picture = torch.arange(batch, device=regions.device)[:, None, None]
    most = (height // block + 2) * across
    number = (picture * most + blocks) * (int(regions.max()) + 1) + regions
    return number.unique(return_inverse=True)[1]


@torch.no_grad()
def means_of_regions(regions: Tensor, low: Tensor, fine: Tensor | None) -> Tensor:
    """Mean features ``[R, C]`` of the regions ``[B, H, W]`` of :class:`Batch`.

    Of the mean of ``low`` and ``fine`` (or of ``low`` alone), both upsampled bilinearly; but a mean
    over pixels of interpolated cells is a product of the cells with a small matrix, and no large
    map is made.
    """
    means = []
    for b, own in enumerate(regions):
        first = int(own.min())
        own = own - first
        count = int(own.max()) + 1
        size = torch.bincount(own.flatten(), minlength=count)
        total = None
        for x in (low, fine):
            if x is not None:
                part = _membership(own, count, x.shape[-2:]).to(x) @ x[b].flatten(1).T
                total = part if total is None else 0.5 * (total + part)
        means.append(total / size[:, None])
    return torch.cat(means)


def _membership(regions: Tensor, count: int, grid: tuple[int, int]) -> Tensor:
    """``[R, h w]``: how much of each cell goes into a region's pixels, interpolated bilinearly."""
    taps = []
    for cells, pixels in zip(grid, regions.shape, strict=True):
        plan = plan_axis(cells, pixels, True)
        base, fraction = plan.base.to(regions.device), plan.fraction.float().to(regions.device)
        taps.append(
            (
                (base.clamp(0, cells - 1), 1 - fraction),
                ((base + 1).clamp(0, cells - 1), fraction),
            )
        )
    cells = grid[0] * grid[1]
    place = regions * cells
    matrix = torch.zeros(count * cells, device=regions.device)
    for row, row_share in taps[0]:
        for column, column_share in taps[1]:
            index = place + (row * grid[1])[:, None] + column
            share = row_share[:, None] * column_share
            matrix += torch.bincount(index.flatten(), share.flatten(), count * cells)
    return matrix.unflatten(0, (count, cells))
