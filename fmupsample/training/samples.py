"""Which crops each step takes of the pictures.

What a step sees is a function of the seed and of the numbers of its samples, and of nothing else:
not of threads, of how many processes share the work, or of whether the run was interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmupsample.prefetch import prefetch
from fmupsample.threads import compute_alone
from fmupsample.training.config import TrainConfig
from fmupsample.training.pictures import Loaded, Pictures

# Streams of random numbers, kept apart by a number in their seeds.
_ORDER, _CROP, _STEP, _HELD, _TURN = range(5)


@dataclass(frozen=True)
class Sample:
    """One crop of one square.

    Attributes:
        square: its number.
        view: names what the backbone sees of it: equal squares and views, equal pictures.
        top, left, side: of the crop, as shares of the square's side.
        flip: mirrored, left and right.
        blocks: where the grid of blocks begins, as shares of a block, down and right.
    """

    square: int
    view: int
    top: float
    left: float
    side: float
    flip: bool
    blocks: tuple[float, float]


Samples = list[tuple[Sample, Loaded]]


class Sampler:
    """Sample numbers -> samples. Numbers count from 0 through the whole run, over all processes.

    Every square comes once before any comes again, in an order drawn anew each time.
    """

    def __init__(self, config: TrainConfig, squares: int, views: int = 0) -> None:
        self.config, self.squares, self.views = config, squares, views
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def __call__(self, number: int) -> Sample:
        epoch, place = divmod(number, self.squares)
        if epoch != self._epoch:
            order = np.random.default_rng([self.config.seed, _ORDER, epoch])
            self._epoch, self._order = epoch, order.permutation(self.squares)
        square = int(self._order[place])
        if not self.views:
            return self._draw(square, number, [self.config.seed, _CROP, number], number)
        view = epoch % self.views
        return self._draw(square, view, [self.config.seed, _CROP, square, view], number)

    def held_out(self, square: int) -> Sample:
        """The crop of a held-out square: always the same."""
        return self._draw(square, 0, [self.config.seed, _HELD, square], square)

    def phase(self, step: int) -> tuple[int, int]:
        """The first row and column of the pixels looked at in a step."""
        random = np.random.default_rng([self.config.seed, _STEP, step])
        y, x = random.integers(0, self.config.pixel_stride, 2)
        return int(y), int(x)

    def turn(self, step: int, backbones: int) -> int:
        """Which of the backbones a step is about."""
        if backbones == 1:
            return 0
        # Each comes once before any comes again.
        round_, place = divmod(step, backbones)
        order = np.random.default_rng([self.config.seed, _TURN, round_]).permutation(backbones)
        return int(order[place])

    def _draw(self, square: int, view: int, seed: list[int], number: int) -> Sample:
        random, config = np.random.default_rng(seed), self.config
        side = float(random.uniform(*config.crop))
        top, left = (float(v) for v in random.uniform(0, 1 - side, 2))
        flip = bool(random.random() < config.flip)
        # What the backbone does not see may be new even where a view comes again.
        y, x = (float(v) for v in np.random.default_rng([*seed, number]).random(2))
        return Sample(square, view, top, left, side, flip, (y, x))


class Stream:
    """Decodes the samples of each step ahead, in threads.

    Args:
        rank, world: this process takes every ``world``-th run of ``batch`` samples.
    """

    def __init__(
        self,
        pictures: Pictures,
        sampler: Sampler,
        batch: int,
        *,
        rank: int = 0,
        world: int = 1,
        workers: int = 1,
    ) -> None:
        self.pictures, self.sampler, self.batch = pictures, sampler, batch
        self.rank, self.world, self.workers = rank, world, workers

    def numbers(self, step: int) -> range:
        """The numbers of this process's samples in a step."""
        first = (step * self.world + self.rank) * self.batch
        return range(first, first + self.batch)

    def __call__(self, start: int, stop: int) -> Iterator[Samples]:
        """The samples of the steps ``start`` to ``stop - 1``, step by step."""
        samples = (self.sampler(n) for step in range(start, stop) for n in self.numbers(step))
        loaded: Any = prefetch(
            lambda sample: self.pictures.load(sample.square),
            samples,
            workers=self.workers,
            ahead=self.workers + 2 * self.batch,
            begin=compute_alone,
        )
        step: Samples = []
        try:
            for sample, picture, error in loaded:
                if error is not None:
                    raise error
                step.append((sample, picture))
                if len(step) == self.batch:
                    yield step
                    step = []
        finally:
            loaded.close()
