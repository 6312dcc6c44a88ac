"""What a linear probe is fitted for: how many outputs it has, its loss, and how it is judged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fmupsample.errors import UsageError
from fmupsample.probing.metrics import IGNORE, Confusion

# Logits at the original pixels beyond this are made for some classes at a time.
_CHUNK_BYTES = 256 * 2**20


class Judge(Protocol):
    """Collects decisions over a set."""

    def add(self, decided: Tensor, labels: Tensor) -> None:
        """One picture, both ``[H, W]``."""

    def score(self) -> float:
        """What the best learning rate has the most of."""


class Task(Protocol):
    """Everything that differs between segmentation and depth.

    Attributes:
        outputs: channels of the probe.
        nothing: what stands in the labels where there is none.
        worst: a score below every other.
        separable: whether the loss of a batch is the sum of its pictures'.
    """

    outputs: int
    separable: bool
    nothing: Any
    worst: float

    def check(self, labels: Tensor, where: str) -> None:
        """Raise a UsageError that names ``where`` if ``labels`` cannot be learnt."""

    def judged(self, labels: Tensor) -> Tensor:
        """Bool: which of them say something."""

    def loss(self, logits: Tensor, target: Tensor, scale: Tensor, labelled: int) -> Tensor:
        """The loss of each rate ``[rates]``.

        Args:
            logits: ``[n, rates, outputs]``.
            target: ``[n]``.
            scale: ``[n]``, how many pixels each stands for.
            labelled: pixels of the batch with a label.
        """

    def decide(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """``[outputs, h, w]`` -> ``[H, W]`` of ``size``, comparable with labels."""

    def judge(self) -> Judge:
        """A new one."""


def largest(logits: Tensor | Iterable[Tensor]) -> Tensor:
    """``logits.argmax(0)`` for up to 256 maps ``[H, W]``, int64, in an eighth of its time on a CPU.

    Also of maps that are made one after the other.
    """
    maps = iter(logits)
    best = next(maps)
    found = torch.zeros(best.shape, dtype=torch.uint8, device=best.device)
    for number, own in enumerate(maps, 1):
        found.masked_fill_(own > best, number)
        best = torch.maximum(best, own)
    return found.long()


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """``[V, h, w]`` at ``size``, bilinearly."""
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps[None], size, mode="bilinear")[0]


def classes_at(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The class of the largest of ``logits`` ``[classes, h, w]`` at ``size``, int64 ``[H, W]``."""
    step = max(1, _CHUNK_BYTES // (4 * size[0] * size[1]))
    return largest(own for part in logits.split(step) for own in resized(part, size))


class Classes:
    """Segmentation: cross-entropy, judged by mIoU."""

    worst = 0.0
    separable = True

    def __init__(self, classes: int, ignore: int = IGNORE) -> None:
        self.outputs, self.nothing = classes, ignore

    def check(self, labels: Tensor, where: str) -> None:
        found = labels[labels != self.nothing]
        if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < self.outputs:
            raise UsageError(
                f"the labels of {where} go from {int(found.min())} to {int(found.max())}, which "
                f"are not {self.outputs} classes from 0 on (ignored: {self.nothing})"
            )

    def judged(self, labels: Tensor) -> Tensor:
        return labels != self.nothing

    def loss(self, logits: Tensor, target: Tensor, scale: Tensor, labelled: int) -> Tensor:
        rates = logits.shape[1]
        each = F.cross_entropy(
            logits.flatten(0, 1),
            target.long().repeat_interleave(rates),
            ignore_index=self.nothing,
            reduction="none",
        ).view(-1, rates)
        return (each * scale[:, None]).sum(0) / labelled

    def decide(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        return classes_at(logits, size)

    def judge(self) -> Judge:
        return Confusion(self.outputs, self.nothing)


class Depth:
    """Distances in metres: a softened choice among bins, sigloss, judged by the relative error.

    Depth is the mean of evenly spaced bin centres, weighted by ``relu(logit) + 0.1`` (linear
    normalisation, as in AdaBins, Bhat et al. 2021, and the linear heads of DINOv2). The loss is the
    scale-invariant one of Eigen et al. (2014), ``sqrt(var(g) + 0.15 mean(g)^2)`` with
    ``g = log depth - log truth`` over the batch.

    Args:
        low, high: metres between which the bins lie.
        bins: their number.
    """

    nothing = 0.0
    worst = float("-inf")
    separable = False

    def __init__(self, low: float = 0.001, high: float = 10.0, bins: int = 256) -> None:
        if not 0 < low < high < float("inf"):
            raise UsageError(
                f"depths from {low:g} to {high:g} m are not possible: give 0 < --min-depth < "
                "--max-depth"
            )
        self.low, self.high, self.outputs = low, high, bins
        self.centres = torch.linspace(low, high, bins)

    def check(self, labels: Tensor, where: str) -> None:
        if not self.judged(labels).any():
            raise UsageError(
                f"the depths of {where} hold no value between {self.low:g} and {self.high:g} m "
                "(is --depth-scale right?)"
            )

    def judged(self, labels: Tensor) -> Tensor:
        return (labels >= self.low) & (labels <= self.high)

    def known(self, labels: Tensor) -> Tensor:
        """The distances that count, or an even sample of some ten thousand, ``[n]``."""
        found = labels[self.judged(labels)]
        return found[:: max(1, len(found) // 10_000)]

    def depth(self, logits: Tensor, dim: int = 0) -> Tensor:
        """Metres: the outputs along ``dim`` become one."""
        shares = logits.relu() + 0.1
        shape = [1] * logits.ndim
        shape[dim] = -1
        return (shares * self.centres.to(logits).view(shape)).sum(dim) / shares.sum(dim)

    def loss(self, logits: Tensor, target: Tensor, scale: Tensor, labelled: int) -> Tensor:
        judged = self.judged(target)
        found = self.depth(logits, dim=-1)  # [n, rates]
        gap = found.log() - target.where(judged, found.new_ones(())).log()[:, None]
        share = (scale * judged)[:, None] / (scale * judged).sum().clamp(min=1)
        mean = (gap * share).sum(0)
        variance = (gap.square() * share).sum(0) - mean.square()
        return (variance.clamp(min=0) + 0.15 * mean.square() + 1e-8).sqrt()

    def decide(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        return resized(self.depth(logits)[None], size)[0]

    def judge(self) -> Judge:
        return DepthErrors(self)


class DepthErrors:
    """The usual figures: each the mean over pictures, over pixels with a truth within range.

    delta1..3: share of pixels with ``max(found / true, true / found)`` below 1.25, 1.25^2, 1.25^3;
    abs_rel: mean of ``|found - true| / true``; rmse in metres.
    """

    def __init__(self, task: Depth) -> None:
        self.task = task
        self.rows: list[dict[str, float]] = []

    def add(self, decided: Tensor, labels: Tensor) -> None:
        judged = self.task.judged(labels)
        if not judged.any():
            return
        found, true = decided[judged].double(), labels[judged].double()
        ratio = torch.maximum(found / true, true / found)
        row = {f"delta{n}": (ratio < 1.25**n).double().mean().item() for n in (1, 2, 3)}
        row["abs_rel"] = ((found - true).abs() / true).mean().item()
        row["rmse"] = (found - true).square().mean().sqrt().item()
        self.rows.append(row)

    def summary(self) -> dict[str, float]:
        """Means over the pictures; empty without any."""
        if not self.rows:
            return {}
        return {k: sum(r[k] for r in self.rows) / len(self.rows) for k in self.rows[0]}

    def score(self) -> float:
        return -self.summary()["abs_rel"] if self.rows else float("-inf")
