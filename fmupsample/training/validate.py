"""How good a head is on pictures it is not trained on, against bilinear interpolation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fmupsample.training.feed import Feed
from fmupsample.training.pictures import Pictures
from fmupsample.training.samples import Sampler
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

    @property
    def relative(self) -> dict[str, float]:
        """Each term of the head over that of bilinear interpolation."""
        return {
            name: self.terms[name] / reference
            for name, reference in self.bilinear.items()
            if reference > 1e-12
        }

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
    def __call__(self, head: Upsampler, batch_size: int) -> Score:
        """Score ``head``, ``batch_size`` crops at a time."""
        head.eval()
        found = self._losses(head, batch_size)
        head.train()
        if self._bilinear is None:  # it never changes
            self._bilinear = self._losses(Bilinear(), batch_size)
        total = self.feeds[0].objective.total
        return Score(found, dict(self._bilinear), float(total(found)), float(total(self._bilinear)))

    def _losses(self, upsampler: Upsampler, batch_size: int) -> dict[str, float]:
        sums: dict[str, float] = {}
        for feed in self.feeds:
            upsampler.use_with(feed.backbone.mean, feed.backbone.std)
            for first in range(0, len(self.samples), batch_size):
                chosen = self.samples[first : first + batch_size]
                samples = [(sample, self.pictures.load(sample.square)) for sample in chosen]
                batch = feed.batch(samples, feed.size(0), (0, 0), held=True)
                share = len(samples) / len(self.samples) / len(self.feeds)
                for name, value in feed.objective(upsampler, batch).items():
                    sums[name] = sums.get(name, 0.0) + share * float(value)
        return sums
