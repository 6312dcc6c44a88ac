"""Batches of cached pictures with labels, and the loss and gradients of the classifiers on them.

Several learning rates are fitted in one pass: they read the same features and kernel weights, and
their logits are reassembled together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fmupsample.probing.cache import EncodedPicture, View
from fmupsample.probing.linear import LinearProbe
from fmupsample.probing.options import FitOptions
from fmupsample.probing.tasks import Task
from fmupsample.upsamplers.base import Upsampler

# Shares of the mean variance: added to that of every direction before whitening; counted as none.
_LEAST_VARIANCE = 1e-3
_NO_VARIANCE = 1e-6
_PIXELS = 1 << 14  # whose loss is taken at once, where all pixels count
_MAPS = 8  # that are reassembled at once then


@dataclass(frozen=True)
class Example:
    """A picture with its labels.

    Attributes:
        labels: integers ``[H, W]``, of any size; of other tasks than classes: what the task asks.
    """

    picture: EncodedPicture
    labels: Tensor


class Classifiers:
    """Those of all learning rates, on whitened features."""

    def __init__(
        self,
        examples: Sequence[Example],
        outputs: int,
        options: FitOptions,
        generator: torch.Generator,
    ) -> None:
        self.mean, self.white = _whitening(examples, options.whiten)
        start = 0.01 * torch.randn(outputs, len(self.mean), generator=generator)
        self.parameters = [
            [start.clone().requires_grad_(), torch.zeros(outputs).requires_grad_()]
            for _ in options.rates
        ]

    def folded(self) -> LinearProbe:
        """All of them as one probe of ``rates * outputs``, for features as they are."""
        weight = torch.cat([w for w, _ in self.parameters]) @ self.white.T
        bias = torch.cat([b for _, b in self.parameters])
        return LinearProbe(weight, bias - weight @ self.mean)

    @torch.no_grad()
    def probes(self) -> list[LinearProbe]:
        """The probe of each rate."""
        one, rates = self.folded(), len(self.parameters)
        parts = zip(one.weight.chunk(rates), one.bias.chunk(rates), strict=True)
        return [LinearProbe(w.clone(), b.clone()) for w, b in parts]


def _whitening(examples: Sequence[Example], share: float = 1.0) -> tuple[Tensor, Tensor]:
    """Mean ``[C]`` and matrix ``[C, C]``: ``(x - mean) @ matrix`` has uncorrelated channels.

    With a ``share`` of 1 all have a variance of 1, with 0 they keep the ratios of their variances
    (and the mean is 1): a few labels then decide by what the features differ in most.

    Taken over the features of all pictures, unflipped. Directions in which the features hardly
    vary are not blown up to a variance of 1, since they may be the effect of few pictures, and
    those of mere rounding are left out.
    """
    count, total, square = 0, 0.0, 0.0
    for example in examples:
        flat = example.picture.view().features.flatten(1).double()
        count += flat.shape[1]
        total, square = total + flat.sum(1), square + flat @ flat.T
    mean = total / count
    covariance = square / count - mean[:, None] * mean
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=0)
    average = values.mean()
    scale = (values + _LEAST_VARIANCE * average) ** (-share / 2) * average ** ((share - 1) / 2)
    scale[values <= _NO_VARIANCE * average] = 0
    return mean.float(), (vectors * scale).float()


class Batches:
    """Batches of views with labels, and the loss of a batch."""

    def __init__(
        self,
        examples: Sequence[Example],
        upsampler: Upsampler,
        task: Task,
        options: FitOptions,
        generator: torch.Generator,
    ) -> None:
        self.examples, self.upsampler, self.options = examples, upsampler, options
        self.task, self.generator = task, generator
        self.labels: dict[tuple[int, tuple[int, int]], Tensor] = {}
        self.queue: list[int] = []

    def draw(self, count: int) -> list[tuple[int, bool]]:
        """The next pictures, each with whether it is flipped; every picture once per pass."""
        while len(self.queue) < count:
            self.queue += torch.randperm(len(self.examples), generator=self.generator).tolist()
        chosen, self.queue = self.queue[:count], self.queue[count:]
        flips = torch.rand(count, generator=self.generator) < 0.5
        return [(i, self.options.flips and f) for i, f in zip(chosen, flips.tolist(), strict=True)]

    def backward(self, classifiers: Classifiers, batch: list[tuple[int, bool]]) -> Tensor:
        """Add the gradients of :meth:`loss`, and return it.

        Where all pixels count, a picture at a time, so that the maps of one are in memory.
        """
        if self.options.pixels is None and self.task.separable:
            return self._backward_whole(classifiers, batch)
        loss = self.loss(classifiers, batch)
        # The rates share no parameter, so the gradient of the sum is that of each.
        loss.sum().backward()
        return loss.detach()

    def loss(self, classifiers: Classifiers, batch: list[tuple[int, bool]]) -> Tensor:
        """The task's loss over the labelled pixels of the batch, per rate: ``[rates]``."""
        probe = classifiers.folded()
        logits, targets, scales, labelled = [], [], [], 0
        for view, labels in self._shown(batch):
            judged = self.task.judged(labels)
            count = int(judged.sum())
            labelled += count
            some, target, scale = self._pixels(view, probe, labels, judged, count)
            logits.append(some)
            targets.append(target)
            scales.append(torch.full((len(target),), scale))
        each = torch.cat(logits).unflatten(1, (len(self.options.rates), -1))  # [n, rates, outputs]
        return self.task.loss(each, torch.cat(targets), torch.cat(scales), max(labelled, 1))

    def _pixels(
        self, view: View, probe: LinearProbe, labels: Tensor, judged: Tensor, labelled: int
    ) -> tuple[Tensor, Tensor, float]:
        """Logits ``[n, V]`` and labels ``[n]`` of some pixels, and how many each stands for.

        Where fewer pixels are labelled than would be drawn (clicks), they are taken as they are.
        """
        low = probe.logits(view.features)
        count = self.options.pixels
        if count is not None and 0 < labelled <= count < len(labels):
            pixels = judged.nonzero()[:, 0]
            scale = 1.0
        elif count is None or count >= len(labels):
            weights = view.weights.to(low.dtype)[None]
            return self.upsampler.reassemble(weights, low[None])[0].flatten(1).T, labels, 1.0
        else:
            pixels = torch.randint(len(labels), (count,), generator=self.generator)
            scale = len(labels) / count
        return self.upsampler.reassemble_at(view.weights, low, pixels), labels[pixels], scale

    def _backward_whole(self, classifiers: Classifiers, batch: list[tuple[int, bool]]) -> Tensor:
        """:meth:`backward` with the logits of one picture in memory, which become gradients."""
        rates = len(self.options.rates)
        shown = self._shown(batch)
        labelled = sum(int(self.task.judged(labels).sum()) for _, labels in shown)
        total = torch.zeros(rates)
        for view, labels in shown:
            low = classifiers.folded().logits(view.features)
            weights = view.weights.to(low.dtype)[None]
            # A few maps at a time, whose gradients take a few maps of memory in turn.
            logits = [self.upsampler.reassemble(weights, some[None]) for some in low.split(_MAPS)]
            # Reassembly does not need its result to go back, so the gradient may lie in its place.
            gradients = [own.detach()[0].flatten(1) for own in logits]  # [maps, n]
            for start in range(0, len(labels), _PIXELS):
                here = slice(start, start + _PIXELS)
                part = torch.cat([own[:, here] for own in gradients]).T.contiguous()
                part.requires_grad_()
                each = part.unflatten(1, (rates, -1))
                ones = part.new_ones(len(part))
                loss = self.task.loss(each, labels[here], ones, max(labelled, 1))
                found = torch.autograd.grad(loss.sum(), part)[0].T
                for own, some in zip(gradients, found.split(_MAPS), strict=True):
                    own[:, here] = some
                total += loss.detach()
            shaped = [g.view_as(own) for g, own in zip(gradients, logits, strict=True)]
            torch.autograd.backward(logits, shaped)
        return total

    def _shown(self, batch: list[tuple[int, bool]]) -> list[tuple[View, Tensor]]:
        """Each view, and the labels ``[n]`` of its pixels."""
        views = [(index, flip, self.examples[index].picture.view(flip)) for index, flip in batch]
        return [(view, self.labels_of(i, view, flip).flatten()) for i, flip, view in views]

    def labels_of(self, index: int, view: View, flipped: bool = False) -> Tensor:
        """Labels ``[H, W]`` of the pixels of a view; its padding has none."""
        key = (index, view.size)
        height, width = view.placed or view.size
        if key not in self.labels:
            example = self.examples[index]
            self.task.check(example.labels, str(example.picture.source))
            labels = labels_at(example.labels, (height, width))
            below, right = view.size[0] - height, view.size[1] - width
            self.labels[key] = F.pad(labels, (0, right, 0, below), value=self.task.nothing)
        labels = self.labels[key]
        return torch.cat([labels[:, :width].flip(-1), labels[:, width:]], -1) if flipped else labels


def labels_at(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """``labels`` ``[H, W]`` at another size: each pixel takes the label at its centre."""
    if labels.shape == size:
        return labels
    # float32 holds every label exactly.
    resized = F.interpolate(labels[None, None].float(), size, mode="nearest-exact")[0, 0]
    return resized.to(labels.dtype)
