"""The steps of a run: gradients, updates, averages, validations, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fmupsample.device import is_out_of_memory
from fmupsample.errors import FmupsampleError, TrainingError
from fmupsample.finite import is_finite
from fmupsample.progress import SILENT, Progress
from fmupsample.training.config import TrainConfig
from fmupsample.training.distributed import World
from fmupsample.training.feed import Feed
from fmupsample.training.interruption import Interruption
from fmupsample.training.model import learning_rate, update_average
from fmupsample.training.report import Log
from fmupsample.training.samples import Samples, Stream
from fmupsample.training.validate import Score, Validator
from fmupsample.upsamplers.base import Upsampler

_CHECKPOINT_SECONDS = 60.0
_MOST_SKIPPED = 50  # steps in a row that fp16 may skip before it is a fault


@dataclass
class Best:
    """The averaged weights with the lowest held-out loss so far."""

    step: int
    score: Score
    state: dict[str, Tensor]


class Keeper(Protocol):
    """Writes down what becomes of a run; see :class:`fmupsample.training.work.WorkFolder`."""

    log: Log

    def save(self, state: dict[str, Any]) -> None: ...

    def draw(self, trainer: Trainer) -> None: ...


class Trainer:
    """One run from wherever it stands to its end.

    Args:
        head: on the device; ``average``, ``best`` and all else start from it.
        feeds: of the backbones; one is drawn for each step.
        validator: ``None``: no validation, the last weights are taken.
        keeper: of the files of the run, for the process that leads.

    Attributes:
        step: how many steps are done.
        parts: into how many a step's samples are divided, for memory's sake.
        seconds: spent, in earlier runs too.
    """

    def __init__(
        self,
        head: Upsampler,
        feeds: Sequence[Feed],
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        world: World,
        stream: Stream,
        keeper: Keeper,
        validator: Validator | None = None,
        progress: Progress = SILENT,
    ) -> None:
        self.head, self.feeds, self.optimizer = head, feeds, optimizer
        self.config, self.world, self.stream = config, world, stream
        self.keeper, self.validator, self.progress = keeper, validator, progress
        self.average = deepcopy(head).requires_grad_(False)
        self.best: Best | None = None
        self.step, self.parts, self.seconds, self._skipped = 0, 1, 0.0, 0
        self.scaler = torch.amp.GradScaler(
            world.device.type,
            enabled=config.precision == "fp16" and world.device.type == "cuda",
        )

    # -- going on where it stopped ----------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on."""
        device = self.world.device
        return {
            "step": self.step,
            "parts": self.parts,
            "seconds": self.seconds,
            "head": self.head.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "feeds": [feed.state() for feed in self.feeds],
            "rng": torch.get_rng_state(),
            "rng_device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "best": None if self.best is None else {
                "step": self.best.step,
                "score": asdict(self.best.score),
                "state": self.best.state,
            },
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Stand where :meth:`state` was taken."""
        self.step, self.parts, self.seconds = state["step"], state["parts"], state["seconds"]
        self.head.load_state_dict(state["head"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for feed, known in zip(self.feeds, state["feeds"], strict=True):
            feed.load(known)
        torch.set_rng_state(state["rng"])
        if state["rng_device"] is not None and self.world.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng_device"], self.world.device)
        if state["best"] is not None:
            best = state["best"]
            self.best = Best(best["step"], Score(**best["score"]), best["state"])

    # -- the loop ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Do the remaining steps.

        Raises:
            KeyboardInterrupt: after Ctrl-C (or SIGTERM), with a checkpoint written.
            TrainingError: a loss that is not finite; the checkpoint holds the last good weights.
            FmupsampleError: a single crop does not fit into memory.
        """
        self.head.train()
        self.progress.start(self.config.steps, "training")
        self.progress.advance(self.step)
        # What earlier runs took counts too.
        began = time.monotonic() - self.seconds
        saved = time.monotonic()
        steps = self.stream(self.step, self.config.steps)
        with Interruption(at_once_when_repeated=self.world.size == 1) as interruption:
            try:
                for samples in steps:
                    if self.world.size == 1 and interruption.asked:
                        self._stop()
                    self._do_step(samples, interruption)
                    self.seconds = time.monotonic() - began
                    last = self.step == self.config.steps
                    due = last or self.step % self.config.validate_every == 0
                    if due:
                        self._validate()
                    if due or time.monotonic() - saved > _CHECKPOINT_SECONDS:
                        self.seconds = time.monotonic() - began
                        self._save()
                        saved = time.monotonic()
                    self.progress.advance()
            finally:
                steps.close()

    def _do_step(self, samples: Samples, interruption: Interruption) -> None:
        config, step = self.config, self.step
        lr = learning_rate(step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        values = self._gradients(samples, step)
        names, terms = list(values), torch.stack(list(values.values()))
        asked = torch.full((1,), float(interruption.asked), device=terms.device)
        parameters = [p for p in self.head.parameters() if p.requires_grad]
        gradients = [p.grad for p in parameters]
        self.world.sum([*gradients, terms, asked])
        if self.world.size > 1:
            terms = terms / self.world.size
            for gradient in gradients:
                gradient.div_(self.world.size)
            if asked.item():
                self._stop()
        terms = dict(zip(names, terms.tolist(), strict=True))
        loss = float(self.feeds[0].objective.total(terms))
        norm = self._update(loss, gradients)
        update_average(self.average, self.head, step, config.ema)
        self.step += 1
        if self.step % config.log_every == 0 or self.step in (1, config.steps):
            self._log(
                {"loss": round(loss, 6), "terms": {k: round(v, 6) for k, v in terms.items()},
                 "lr": lr, "gradient_norm": norm, "seconds": round(self.seconds, 2)}
            )  # fmt: skip
            held = f", held out {self.best.score.ratio:.3f} of bilinear" if self.best else ""
            self.progress.describe(f"training, loss {loss:.4f}{held}")

    def _update(self, loss: float, gradients: list[Tensor]) -> float:
        """Clip and apply the gradients; their norm."""
        if not math.isfinite(loss):
            self._fail(f"the loss became {loss}")
        self.scaler.unscale_(self.optimizer)
        finite = all(map(is_finite, gradients))
        if not finite and not self.scaler.is_enabled():
            self._fail("the gradient is not finite")
        # fp16 overflows now and then: the scaler skips that step and scales less.
        self._skipped = 0 if finite else self._skipped + 1
        if self._skipped > _MOST_SKIPPED:
            self._fail(f"the gradient was not finite {self._skipped} times in a row")
        norm = float(nn.utils.clip_grad_norm_(self.head.parameters(), self.config.clip))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm

    def _gradients(self, samples: Samples, step: int) -> dict[str, Tensor]:
        """Leave the gradients of this process's samples in the parameters; the terms' values.

        Where memory runs out, the samples are halved until they fit.
        """
        while True:
            try:
                return self._accumulate(samples, step)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if self.parts >= len(samples):
                    size = max(self.config.image_sizes)
                    raise FmupsampleError(
                        f"training on a single crop of {size}x{size} pixels needs more memory "
                        f"than {self.world.device} has; use a smaller --image-size"
                    ) from error
            # Outside the handler, which would keep the tensors of the failed attempt alive.
            self.parts = min(2 * self.parts, len(samples))
            if self.world.device.type == "cuda":
                torch.cuda.empty_cache()
            self.progress.warn(
                f"out of memory: from now on every step takes its {len(samples)} crops in "
                f"{self.parts} parts"
            )

    def _accumulate(self, samples: Samples, step: int) -> dict[str, Tensor]:
        sampler = self.stream.sampler
        feed = self.feeds[sampler.turn(step, len(self.feeds))]
        size, phase = feed.size(step), sampler.phase(step)
        self.head.use_with(feed.backbone.mean, feed.backbone.std)
        self.optimizer.zero_grad(set_to_none=True)
        values: dict[str, Tensor] = {}
        for part in _divided(samples, self.parts):
            share = len(part) / len(samples)
            batch = feed.batch(part, size, phase)
            terms = feed.objective(self.head, batch)
            loss = feed.objective.total(terms)
            self.scaler.scale(share * loss).backward()
            for name, value in terms.items():
                values[name] = values.get(name, 0) + share * value.detach()
        for parameter in self.head.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return values

    # -- what happens now and then ----------------------------------------------------------------

    def _validate(self) -> None:
        if self.world.leads and self.validator is not None:
            size = max(1, self.config.batch_size // self.parts)
            score = self.validator(self.average, size)
            self._log({"held_out": score.to_json()})
            if self.best is None or score.loss < self.best.score.loss:
                state = {k: v.detach().cpu().clone() for k, v in self.average.state_dict().items()}
                self.best = Best(self.step, score, state)
        if self.world.leads:
            self.keeper.draw(self)

    def _log(self, record: dict[str, Any]) -> None:
        if self.world.leads:
            self.keeper.log.add({"step": self.step, **record})

    def _save(self) -> None:
        if self.world.leads:
            self.keeper.save(self.state())

    def _stop(self) -> None:
        self._save()
        raise KeyboardInterrupt

    def _fail(self, what: str) -> None:
        self._save()
        raise TrainingError(
            f"{what} in step {self.step + 1} of {self.config.steps}; the weights after step "
            f"{self.step} are in the checkpoint; go on from there with --resume and a smaller "
            f"--lr (it was {self.config.lr:g})"
        )


def _divided(samples: list, parts: int) -> Iterator[list]:
    """``samples`` in ``parts`` pieces of nearly equal length."""
    edges = [round(i * len(samples) / parts) for i in range(parts + 1)]
    for first, last in pairwise(edges):
        if last > first:
            yield samples[first:last]
