"""A linear probe on upsampled features, fitted without ever making them.

A 1x1 convolution commutes with reassembly (kernel weights sum to 1): logits are computed at low
resolution and reassembled, which gives the logits and the gradients of the convolution on the
upsampled features. Several learning rates are fitted in one pass: they read the same features and
kernel weights, and their logits are reassembled together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmupsample.errors import FmupsampleError, UsageError
from fmupsample.probing.cache import EncodedPicture, View
from fmupsample.probing.metrics import IGNORE
from fmupsample.probing.tasks import Classes, Task
from fmupsample.progress import SILENT, Progress
from fmupsample.upsamplers.base import Upsampler

# Shares of the mean variance: added to that of every direction before whitening; counted as none.
_LEAST_VARIANCE = 1e-3
_NO_VARIANCE = 1e-6
_PIXELS = 1 << 14  # whose loss is taken at once, where all pixels count
_MAPS = 8  # that are reassembled at once then
_LOGITS_BYTES = 256 * 2**20


@dataclass(frozen=True)
class FitOptions:
    """How a probe is fitted."""

    rates: tuple[float, ...] = (5e-4,)  # learning rates to choose from, of AdamW
    epochs: int = 20  # passes over the training pictures
    steps: int | None = None  # instead of epochs
    batch_size: int = 4  # pictures
    pixels: int | None = 4096  # drawn per picture and step; None: all of them
    flips: bool = True  # show half of the pictures mirrored left to right
    holdout: float = 0.1  # share of the pictures by which the rate is chosen, if there are several
    weight_decay: float = 1e-2
    whiten: float = 1.0  # 1: all directions of the features have the same variance; 0: their own
    ignore: int = IGNORE  # label of pixels that are not used
    seed: int = 0  # of the start, the order, the flips, the pixels and the held-out pictures

    def __post_init__(self) -> None:
        if not self.rates or min(self.rates) <= 0:
            raise UsageError("a probe needs one learning rate or more, above 0")
        for name in ("epochs", "steps", "batch_size", "pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} {value} is not possible: it must be at least 1")
        if not 0 <= self.whiten <= 1:
            raise UsageError(f"whiten {self.whiten} is not a share from 0 to 1")
        if not 0 < self.holdout < 1:
            raise UsageError(f"holdout {self.holdout} is not a share between 0 and 1")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Example:
    """A picture with its labels.

    Attributes:
        labels: integers ``[H, W]``, of any size; of other tasks than classes: what the task asks.
    """

    picture: EncodedPicture
    labels: Tensor


@dataclass(frozen=True)
class LinearProbe:
    """A 1x1 convolution: ``weight`` ``[outputs, C]``, ``bias`` ``[outputs]``, both float32."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """``[C, h, w]`` -> ``[outputs, h, w]``."""
        return _affine(self.weight, self.bias, features)


@dataclass(frozen=True)
class Fit:
    """A fitted probe, and how its learning rate was chosen.

    Attributes:
        held_out: what the task judges by (mIoU; for depth the negative relative error), of each
            rate, on the held-out or validation pictures; empty where there was no choice.
        loss: mean training loss over the last tenth of the steps.
    """

    probe: LinearProbe
    rate: float
    held_out: dict[float, float]
    loss: float


def fit_probe(
    examples: Sequence[Example],
    upsampler: Upsampler,
    classes: int | Task,
    options: FitOptions | None = None,
    progress: Progress = SILENT,
    *,
    validation: Sequence[Example] = (),
    scored: bool = False,
) -> Fit:
    """Fit a probe on upsampled features, for classes with cross-entropy.

    Labels are brought to the size of the upsampled map (nearest). Features are whitened by their
    mean and covariance over the training pictures, and that is folded into the probe: it does not
    change what a probe can express, only how soon it gets there. AdamW, with cosine decay over all
    steps. With ``options.pixels`` each picture of a batch contributes that many pixels, drawn
    evenly and anew in every step, scaled so that the expected loss and gradient are those of all
    pixels.

    With several learning rates, all are fitted to the pictures but some that are held out, and the
    rate with the highest mIoU on those is fitted again, to all pictures. With ``validation``
    pictures these choose, and nothing is held out or fitted again.

    Args:
        scored: hold out pictures for a single rate too, to compare it with other fits.

    Raises:
        UsageError: no examples, labels that are no classes, or several rates and a single picture.
        FmupsampleError: the fit diverged at every rate.
    """
    options = options or FitOptions()
    if not examples:
        raise UsageError("a probe needs at least one picture with labels")
    task = _task(classes, options)
    scores: dict[float, float] = {}
    chosen = 0
    if validation:
        probes, losses = _train(examples, upsampler, task, options, progress)
        scores = _scores(probes, validation, upsampler, task, options)
        chosen = max(range(len(probes)), key=lambda i: scores[options.rates[i]])
    else:
        if scored or len(options.rates) > 1:
            train, held = _split(examples, options)
            probes, _ = _train(train, upsampler, task, options, progress)
            scores = _scores(probes, held, upsampler, task, options)
            options = replace(options, rates=(max(options.rates, key=lambda rate: scores[rate]),))
        probes, losses = _train(examples, upsampler, task, options, progress)
    if not _is_finite(probes[chosen]):
        raise FmupsampleError(
            f"the probe on {upsampler.name} diverged at the learning rate "
            f"{options.rates[chosen]:g}: give a smaller one"
        )
    last = losses[-max(1, len(losses) // 10) :, chosen].mean().item()
    return Fit(probes[chosen], options.rates[chosen], scores, last)


def _task(classes: int | Task, options: FitOptions) -> Task:
    return Classes(classes, options.ignore) if isinstance(classes, int) else classes


def _train(
    examples: Sequence[Example],
    upsampler: Upsampler,
    classes: int | Task,
    options: FitOptions,
    progress: Progress,
) -> tuple[list[LinearProbe], Tensor]:
    """The probe of each rate, and the losses ``[steps, rates]``."""
    generator = torch.Generator().manual_seed(options.seed)
    batch_size = min(options.batch_size, len(examples))
    steps = options.steps or math.ceil(options.epochs * len(examples) / batch_size)
    task = _task(classes, options)
    stack = _Stack(examples, task.outputs, options, generator)
    data = _TrainingData(examples, upsampler, task, options, generator)
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters, "lr": rate}
            for parameters, rate in zip(stack.parameters, options.rates, strict=True)
        ],
        weight_decay=options.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))
    )
    losses = []
    progress.start(steps, f"probe on {upsampler.name}")
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(data.backward(stack, data.draw(batch_size)))
        optimizer.step()
        schedule.step()
        progress.advance()
    return stack.probes(), torch.stack(losses)


@torch.no_grad()
def predict(
    probes: Sequence[LinearProbe], upsampler: Upsampler, view: View, size: tuple[int, int]
) -> Tensor:
    """Classes of a picture by several probes at once, int64 ``[probes, H, W]``.

    Logits are reassembled to the map's size and brought to ``size`` bilinearly.
    """
    return predict_logits(probes, upsampler, view, size).argmax(1)


@torch.no_grad()
def predict_logits(
    probes: Sequence[LinearProbe], upsampler: Upsampler, view: View, size: tuple[int, int]
) -> Tensor:
    """What :func:`predict` takes the largest of, ``[probes, outputs, H, W]``."""
    weight = torch.cat([p.weight for p in probes])
    bias = torch.cat([p.bias for p in probes])
    low = _affine(weight, bias, view.features)
    logits = upsampler.reassemble(view.weights.to(low.dtype)[None], low[None])
    if view.placed is not None:
        logits = logits[..., : view.placed[0], : view.placed[1]]
    if logits.shape[-2:] != size:
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    return logits[0].unflatten(0, (len(probes), -1))


def _affine(weight: Tensor, bias: Tensor, features: Tensor) -> Tensor:
    flat = torch.addmm(bias[:, None], weight, features.flatten(1).to(weight.dtype))
    return flat.unflatten(1, features.shape[1:])


def _split(examples: Sequence[Example], options: FitOptions) -> tuple[list[Example], list[Example]]:
    """Pictures to fit to, and pictures to choose the learning rate by."""
    if len(examples) == 1:
        raise UsageError(
            "choosing among learning rates or upsamplers needs a second picture with labels: give "
            "one of each"
        )
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(examples), generator=generator).tolist()
    count = min(max(1, round(options.holdout * len(examples))), len(examples) - 1)
    return [examples[i] for i in order[count:]], [examples[i] for i in order[:count]]


class _Stack:
    """The classifiers of all learning rates, on whitened features."""

    def __init__(
        self,
        examples: Sequence[Example],
        classes: int,
        options: FitOptions,
        generator: torch.Generator,
    ) -> None:
        self.mean, self.white = _whitening(examples, options.whiten)
        start = 0.01 * torch.randn(classes, len(self.mean), generator=generator)
        self.parameters = [
            [start.clone().requires_grad_(), torch.zeros(classes).requires_grad_()]
            for _ in options.rates
        ]
        self.classes = classes

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight ``[rates * classes, C]`` and bias for features as they are."""
        weight = torch.cat([w for w, _ in self.parameters]) @ self.white.T
        bias = torch.cat([b for _, b in self.parameters])
        return weight, bias - weight @ self.mean

    @torch.no_grad()
    def probes(self) -> list[LinearProbe]:
        weight, bias = (t.split(self.classes) for t in self.folded())
        return [LinearProbe(w.clone(), b.clone()) for w, b in zip(weight, bias, strict=True)]


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


class _TrainingData:
    """Batches of views with labels, and the loss of a batch."""

    def __init__(
        self,
        examples: Sequence[Example],
        upsampler: Upsampler,
        classes: int | Task,
        options: FitOptions,
        generator: torch.Generator,
    ) -> None:
        self.examples, self.upsampler, self.options = examples, upsampler, options
        self.task, self.generator = _task(classes, options), generator
        self.labels: dict[tuple[int, tuple[int, int]], Tensor] = {}
        self.queue: list[int] = []

    def draw(self, count: int) -> list[tuple[int, bool]]:
        """The next pictures, each with whether it is flipped; every picture once per pass."""
        while len(self.queue) < count:
            self.queue += torch.randperm(len(self.examples), generator=self.generator).tolist()
        chosen, self.queue = self.queue[:count], self.queue[count:]
        flips = torch.rand(count, generator=self.generator) < 0.5
        return [(i, self.options.flips and f) for i, f in zip(chosen, flips.tolist(), strict=True)]

    def backward(self, stack: _Stack, batch: list[tuple[int, bool]]) -> Tensor:
        """Add the gradients of :meth:`loss`, and return it.

        Where all pixels count, a picture at a time, so that the maps of one are in memory.
        """
        if self.options.pixels is None and self.task.separable:
            return self._backward_whole(stack, batch)
        loss = self.loss(stack, batch)
        # The rates share no parameter, so the gradient of the sum is that of each.
        loss.sum().backward()
        return loss.detach()

    def _backward_whole(self, stack: _Stack, batch: list[tuple[int, bool]]) -> Tensor:
        """:meth:`backward` with the logits of one picture in memory, which become gradients."""
        rates = len(self.options.rates)
        views = [(i, flipped, self.examples[i].picture.view(flipped)) for i, flipped in batch]
        labelled = sum(int(self.task.judged(self._labels(i, v)).sum()) for i, _, v in views)
        total = torch.zeros(rates)
        for index, flipped, view in views:
            labels = self._shown_labels(index, view, flipped).flatten()
            low = _affine(*stack.folded(), view.features)
            weights = view.weights.to(low.dtype)[None]
            # A few maps at a time, whose gradients take a few maps of memory in turn.
            logits = [self.upsampler.reassemble(weights, some[None]) for some in low.split(_MAPS)]
            # Reassembly does not need its result to go back, so the gradient may lie in its place.
            gradients = [own.detach()[0].flatten(1) for own in logits]  # [maps, n]
            for start in range(0, len(labels), _PIXELS):
                here = slice(start, start + _PIXELS)
                part = torch.cat([own[:, here] for own in gradients]).T.contiguous()
                part.requires_grad_()
                loss = self.task.loss(
                    part.unflatten(1, (rates, -1)),
                    labels[here],
                    part.new_ones(len(part)),
                    max(labelled, 1),
                )
                found = torch.autograd.grad(loss.sum(), part)[0].T
                for own, some in zip(gradients, found.split(_MAPS), strict=True):
                    own[:, here] = some
                total += loss.detach()
            shaped = [g.view_as(own) for g, own in zip(gradients, logits, strict=True)]
            torch.autograd.backward(logits, shaped)
        return total

    def loss(self, stack: _Stack, batch: list[tuple[int, bool]]) -> Tensor:
        """The task's loss over the labelled pixels of the batch, per rate: ``[rates]``."""
        weight, bias = stack.folded()
        rates = len(self.options.rates)
        logits, targets, scales, labelled = [], [], [], 0
        for index, flipped in batch:
            view = self.examples[index].picture.view(flipped)
            labels = self._shown_labels(index, view, flipped)
            judged = self.task.judged(labels).flatten()
            count = int(judged.sum())
            labelled += count
            low = _affine(weight, bias, view.features)
            some, target, scale = self._pixels(view, low, labels.flatten(), judged, count)
            logits.append(some)
            targets.append(target)
            scales.append(torch.full((len(target),), scale))
        each = torch.cat(logits).unflatten(1, (rates, -1))  # [n, rates, outputs]
        return self.task.loss(each, torch.cat(targets), torch.cat(scales), max(labelled, 1))

    def _pixels(
        self, view: View, low: Tensor, labels: Tensor, judged: Tensor, labelled: int
    ) -> tuple[Tensor, Tensor, float]:
        """Logits ``[n, V]`` and labels ``[n]`` of some pixels, and how many each stands for.

        Where fewer pixels are labelled than would be drawn (clicks), they are taken as they are.
        """
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

    def _shown_labels(self, index: int, view: View, flipped: bool) -> Tensor:
        labels = self._labels(index, view)
        return _mirrored(labels, view.placed) if flipped else labels

    def _labels(self, index: int, view: View) -> Tensor:
        key = (index, view.size)
        if key not in self.labels:
            example = self.examples[index]
            self.task.check(example.labels, str(example.picture.source))
            placed = view.placed or view.size
            labels = labels_at(example.labels, placed)
            below, right = view.size[0] - placed[0], view.size[1] - placed[1]
            self.labels[key] = F.pad(labels, (0, right, 0, below), value=self.task.nothing)
        return self.labels[key]


def _mirrored(labels: Tensor, placed: tuple[int, int] | None) -> Tensor:
    if placed is None:
        return labels.flip(-1)
    return torch.cat([labels[:, : placed[1]].flip(-1), labels[:, placed[1] :]], -1)


def labels_at(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """``labels`` ``[H, W]`` at another size: each pixel takes the label at its centre."""
    if labels.shape == size:
        return labels
    # float32 holds every label exactly.
    resized = F.interpolate(labels[None, None].float(), size, mode="nearest-exact")[0, 0]
    return resized.to(labels.dtype)


def _scores(
    probes: list[LinearProbe],
    held: Sequence[Example],
    upsampler: Upsampler,
    task: Task,
    options: FitOptions,
) -> dict[float, float]:
    """What each rate's probe is worth on held-out pictures; that of a diverged one is lowest."""
    judges = [task.judge() for _ in probes]
    for example in held:
        view = example.picture.view()
        task.check(example.labels, str(example.picture.source))
        size = tuple(example.labels.shape)
        # As many rates at once as fit into bounded memory.
        step = max(1, _LOGITS_BYTES // (4 * task.outputs * size[0] * size[1]))
        for start in range(0, len(probes), step):
            found = predict_logits(probes[start : start + step], upsampler, view, size)
            for judge, logits in zip(judges[start : start + step], found, strict=True):
                judge.add(task.decide(logits), example.labels)
    return {
        rate: judge.score() if _is_finite(probe) else task.worst
        for rate, probe, judge in zip(options.rates, probes, judges, strict=True)
    }


def _is_finite(probe: LinearProbe) -> bool:
    return bool(torch.isfinite(probe.weight).all() and torch.isfinite(probe.bias).all())
