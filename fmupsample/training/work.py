"""The folder of a run, beside its head: options, checkpoint, log, curve and previews."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fmupsample.atomic import replacing
from fmupsample.errors import OutputError, UsageError
from fmupsample.folders import holds_keys, refuse_others_files
from fmupsample.images.find import printable
from fmupsample.training.checkpoint import NAME as CHECKPOINT
from fmupsample.training.checkpoint import damaged, load_checkpoint, save_checkpoint
from fmupsample.training.config import TrainConfig
from fmupsample.training.feed import Feed
from fmupsample.training.loop import Trainer
from fmupsample.training.pictures import Pictures
from fmupsample.training.report import (
    CURVE,
    LOG,
    PREVIEWS,
    Log,
    Previews,
    can_draw_curves,
    draw_curve,
    save_picture,
)

CONFIG = "config.json"


def work_folder(output: Path) -> Path:
    """Where a run keeps its checkpoint, log and pictures: beside the head."""
    return output.with_name(f"{output.name}.train")


def clear_the_way(output: Path, work: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse what is in the way, or remove it with ``overwrite``.

    Raises:
        UsageError: files of others, a head, or an unfinished run.
    """
    if overwrite and resume:
        raise UsageError("--resume and --overwrite exclude each other; give one of them")
    refuse_others_files(
        work, (CONFIG, LOG, CURVE), ours=holds_keys(work / CONFIG, "objective", "steps"),
        instead="choose another folder with --work",
    )  # fmt: skip
    if overwrite:
        for name in (CHECKPOINT, LOG, CURVE, CONFIG):
            (work / name).unlink(missing_ok=True)
        for path in (work / PREVIEWS).glob("step-*-*.png"):
            path.unlink()
        with contextlib.suppress(OSError):  # not there, or with files of others
            (work / PREVIEWS).rmdir()
    elif not resume and output.exists():
        raise UsageError(f"{printable(output)} exists; --overwrite trains it anew")
    elif not resume and (work / CHECKPOINT).exists():
        raise UsageError(
            f"{printable(work)} holds an unfinished run: --resume goes on with it, --overwrite "
            "begins anew"
        )


class WorkFolder:
    """What one run keeps in ``path``.

    Args:
        identity: of pictures and backbones, which a checkpoint must agree with.
        feeds, held: for the previews.
    """

    def __init__(
        self, path: Path, config: TrainConfig, identity: str, feeds: Sequence[Feed], held: Pictures
    ) -> None:
        self.path, self.config, self.identity = path, config, identity
        self.feeds, self.held = feeds, held
        self.log = Log(path / LOG)
        self._previews: Previews | None = None

    def begin(self, step: int) -> None:
        """Write the options, and forget what the log says of steps after ``step``."""
        path = self.path / CONFIG
        try:
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(self.config.to_dict(), indent=1) + "\n")
        except OSError as error:
            raise OutputError(
                f"{printable(path)} cannot be written: {error.strerror or error}"
            ) from error
        self.log.begin(step)

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint."""
        save_checkpoint(self.path / CHECKPOINT, self.config, self.identity, state)

    def load_into(self, trainer: Trainer) -> bool:
        """Take up the checkpoint; ``False``: there is none.

        Raises:
            UsageError: it is damaged, or of another run.
        """
        path = self.path / CHECKPOINT
        if not path.exists():
            return False
        state = load_checkpoint(path, self.config, self.identity)
        try:
            trainer.load(state)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UsageError(damaged(path)) from error
        return True

    def draw(self, trainer: Trainer) -> None:
        """The curve and the previews, after a validation."""
        config = self.config
        if can_draw_curves():
            save_picture(self.path / CURVE, draw_curve(self.log.read(), config.steps))
        if self._previews is None:
            self._previews = Previews(self.feeds, self.held, config.previews, config.side)
        folder = self.path / PREVIEWS
        self._previews.draw(folder, trainer.average, trainer.step, config.steps)
