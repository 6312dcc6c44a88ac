"""How good a head is on pictures it is not trained on, against bilinear interpolation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fmupsample.training.data import Pictures, Sampler
from fmupsample.training.feed import Feed
from fmupsample.training.model import Model
from fmupsample.training.objective import Batch
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.classic import Bilinear

# A loss less than half a percent below bilinear's is no gain that anybody would see.
NO_BETTER = 0.995


@dataclass(frozen=True)
class Score:
    """Held-out losses.

    Attributes:
        terms, bilinear: each term, of the head and of bilinear interpolation.
        loss, bilinear_loss: their weighted sums.
    """

    terms: dict[str, float]
    bilinear: dict[str, float]
    loss: float
    bilinear_loss: float
    relative: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        ratios = {
            name: self.terms[name] / reference
            for name, reference in self.bilinear.items()
            if reference > 1e-12  # colours do not matter to bilinear interpolation
        }
        object.__setattr__(self, "relative", ratios)

    @property
    def ratio(self) -> float:
        """The head's loss over bilinear's."""
        return self.loss / self.bilinear_loss if self.bilinear_loss > 0 else float("inf")

    @property
    def better(self) -> bool:
        return self.ratio < NO_BETTER

    def to_json(self) -> dict[str, Any]:
        def short(values: dict[str, float]) -> dict[str, float]:
            return {name: round(value, 5) for name, value in values.items()}

        return {
            "vs_bilinear": round(self.ratio, 4),
            "terms_vs_bilinear": {k: round(v, 4) for k, v in self.relative.items()},
            "loss": round(self.loss, 5),
            "bilinear_loss": round(self.bilinear_loss, 5),
            "terms": short(self.terms),
            "bilinear_terms": short(self.bilinear),
        }


class Validator:
    """The held-out squares, always in the same crops.

    Args:
        feeds: of the backbones; what is found is the mean over them.
    """

    def __init__(self, feeds: Sequence[Feed], pictures: Pictures, sampler: Sampler) -> None:
        self.feeds, self.pictures = feeds, pictures
        self.samples = [sampler.held_out(n) for n in range(len(pictures))]
        self._bilinear: dict[str, float] | None = None

    @torch.no_grad()
    def __call__(self, model: Model, batch_size: int) -> Score:
        """Score ``model``, ``batch_size`` crops at a time."""
        objective = self.feeds[0].objective
        heads = {"head": {}, "bilinear": {}}
        # Bilinear interpolation never changes, but the probe on it does.
        again = self._bilinear is None or "task" in objective.config.terms
        model.eval()
        for feed in self.feeds:
            model.head.use_with(feed.backbone.mean, feed.backbone.std)
            for first in range(0, len(self.samples), batch_size):
                chosen = self.samples[first : first + batch_size]
                samples = [(sample, self.pictures.load(sample.square)) for sample in chosen]
                batch = feed.batch(samples, feed.size(0), (0, 0), held=True)
                self._add(heads["head"], feed, model.head, batch, model.probe)
                if again:
                    self._add(heads["bilinear"], feed, Bilinear(), batch, model.plain_probe)
        model.train()
        if again:
            self._bilinear = heads["bilinear"]
        return Score(
            heads["head"],
            dict(self._bilinear),
            float(objective.total(heads["head"])),
            float(objective.total(self._bilinear)),
        )

    def _add(
        self,
        sums: dict[str, float],
        feed: Feed,
        upsampler: Upsampler,
        batch: Batch,
        probe: nn.Module | None,
    ) -> None:
        share = len(batch.image) / len(self.samples) / len(self.feeds)
        for name, value in feed.objective(upsampler, batch, probe).items():
            sums[name] = sums.get(name, 0.0) + share * float(value)
