"""What a run is trained and validated on: squares of the pictures, and their masks."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fmupsample.backbones import Backbone
from fmupsample.errors import UsageError
from fmupsample.images.find import Source
from fmupsample.labels.matching import find_labels
from fmupsample.training.checkpoint import content_mark
from fmupsample.training.config import TrainConfig
from fmupsample.training.pictures import (
    LabelFile,
    Square,
    list_squares,
    split_squares,
    validation_squares,
)
from fmupsample.training.regions import check_regions

Say = Callable[[str], None]


@dataclass(frozen=True)
class Given:
    """Pictures and masks as :func:`fmupsample.training.run.train` takes them."""

    sources: Sequence[Source]
    validation: Sequence[Source] = ()
    masks: Sequence[tuple[Path, float]] = ()


@dataclass(frozen=True)
class Data:
    """What a run is trained and validated on.

    Attributes:
        training, held: squares.
        labelled: whether masks were given.
    """

    training: list[Square]
    held: list[Square]
    labelled: bool

    @property
    def pictures(self) -> int:
        """How many pictures the training squares are from."""
        return len({square.source for square in self.training})

    def identity(self, backbones: Sequence[Backbone], processes: int) -> str:
        """What a checkpoint must agree with besides the options."""
        squares = [*self.training, *self.held]
        paths = {path for s in squares for path in (s.source.path, s.labels) if path}
        marks = {path: content_mark(path) for path in paths}
        what = [
            processes, [[each.fingerprint, each.layer] for each in backbones],
            [[str(s.source.relative), s.size, s.part, marks[s.source.path],
              s.labels and marks[s.labels], s.label_weight] for s in squares],
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def find_data(given: Given, config: TrainConfig, warn: Say, say: Say) -> Data:
    """The squares of what was given, with their masks.

    Args:
        config: resolved.

    Raises:
        UsageError: pictures or masks that cannot be used; scikit-image is needed and missing.
    """
    if config.regions:
        check_regions()
    files = _find_masks(given, config)
    smallest = min(config.image_sizes) // 2
    find = partial(list_squares, smallest=smallest, labels=files, warn=warn)
    if given.validation:
        kept = {os.path.realpath(source.path) for source in given.validation}
        sources = [s for s in given.sources if os.path.realpath(s.path) not in kept]
        if len(sources) < len(given.sources):
            count = len(given.sources) - len(sources)
            say(f"{count} pictures are kept for validation only")
        held = validation_squares(find(given.validation, purpose="validation", least=1))
        training = find(sources)
    else:
        training, held = split_squares(find(given.sources), config.held_out)
    return Data(training, held, bool(files))


def _find_masks(given: Given, config: TrainConfig) -> dict[Source, LabelFile]:
    """The files of the pictures that have one; of two, that of the folder named first."""
    if "masks" in config.terms and not given.masks:
        raise UsageError("--objective masks needs --masks FOLDER")
    if given.masks and "masks" not in config.terms:
        raise UsageError("--masks is for --objective masks; no other term looks at masks")
    files: dict[Source, LabelFile] = {}
    for folder, weight in given.masks:
        found = find_labels([folder], [*given.sources, *given.validation], of_all=False)
        files = {source: LabelFile(path, weight) for source, path in found.items()} | files
    return files
