"""Fitting probes: the loop over batches, and the choice of a learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fmupsample.errors import FmupsampleError, UsageError
from fmupsample.probing.batches import Batches, Classifiers, Example
from fmupsample.probing.linear import LinearProbe, upsampled_logits
from fmupsample.probing.options import FitOptions
from fmupsample.probing.tasks import Classes, Task
from fmupsample.progress import SILENT, Progress
from fmupsample.upsamplers.base import Upsampler


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
    task = Classes(classes, options.ignore) if isinstance(classes, int) else classes
    scores: dict[float, float] = {}
    if not validation and (scored or len(options.rates) > 1):
        train, held = _split(examples, options)
        probes, _ = train_all(train, upsampler, task, options, progress)
        scores = _scores(probes, held, upsampler, task, options)
        options = replace(options, rates=(max(scores, key=scores.__getitem__),))
    probes, losses = train_all(examples, upsampler, task, options, progress)
    if validation:
        scores = _scores(probes, validation, upsampler, task, options)
    rate = max(options.rates, key=lambda rate: scores.get(rate, 0.0))
    chosen = options.rates.index(rate)
    if not probes[chosen].is_finite():
        raise FmupsampleError(
            f"the probe on {upsampler.name} diverged at the learning rate {rate:g}: give a "
            "smaller one"
        )
    last = losses[-max(1, len(losses) // 10) :, chosen].mean().item()
    return Fit(probes[chosen], rate, scores, last)


def train_all(
    examples: Sequence[Example],
    upsampler: Upsampler,
    task: Task,
    options: FitOptions,
    progress: Progress = SILENT,
) -> tuple[list[LinearProbe], Tensor]:
    """The probe of each rate, and the losses ``[steps, rates]``."""
    generator = torch.Generator().manual_seed(options.seed)
    batch_size = min(options.batch_size, len(examples))
    steps = options.steps or math.ceil(options.epochs * len(examples) / batch_size)
    classifiers = Classifiers(examples, task.outputs, options, generator)
    batches = Batches(examples, upsampler, task, options, generator)
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters, "lr": rate}
            for parameters, rate in zip(classifiers.parameters, options.rates, strict=True)
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
        losses.append(batches.backward(classifiers, batches.draw(batch_size)))
        optimizer.step()
        schedule.step()
        progress.advance()
    return classifiers.probes(), torch.stack(losses)


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
        view, (height, width) = example.picture.view(), example.labels.shape
        task.check(example.labels, str(example.picture.source))
        for probe, judge in zip(probes, judges, strict=True):
            logits = upsampled_logits(probe, upsampler, view)
            judge.add(task.decide(logits, (height, width)), example.labels)
    return {
        rate: judge.score() if probe.is_finite() else task.worst
        for rate, probe, judge in zip(options.rates, probes, judges, strict=True)
    }
