"""The pictures of a training run: which squares there are, and what is decoded of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fmupsample.errors import ImageError, UsageError
from fmupsample.images.arrays import resize
from fmupsample.images.find import Source
from fmupsample.images.read import read_picture, read_size
from fmupsample.labels import read_labels
from fmupsample.training.regions import find_regions

MIN_PICTURES = 4  # fewer say nothing about pictures in general, and some are kept for validation
_OBLONG = 1.15  # long over short side, from which on a picture gives two squares
_MOST_VALIDATION_SQUARES = 32


class LabelFile(NamedTuple):
    """The labels of a picture, and what they count in the ``masks`` term."""

    path: Path | None
    weight: float = 1.0


@dataclass(frozen=True)
class Square:
    """The middle of a picture (part 0 of 1), or one of its two ends (part 0 or 1 of 2).

    Attributes:
        size: of the upright picture in its file, (H, W).
        labels: the file with its labels, where there is one.
        label_weight: what they count in the ``masks`` term.
    """

    source: Source
    size: tuple[int, int]
    part: int = 0
    parts: int = 1
    labels: Path | None = None
    label_weight: float = 1.0


@dataclass(frozen=True)
class Loaded:
    """A decoded square of side S: ``pixels`` uint8 ``[S, S, 3]``, ``regions`` int32 and ``labels``
    uint8 ``[S, S]`` where they are wanted."""

    pixels: np.ndarray
    regions: np.ndarray | None = None
    labels: np.ndarray | None = None
    label_weight: float = 1.0

    @property
    def bytes(self) -> int:
        parts = (self.pixels, self.regions, self.labels)
        return sum(part.nbytes for part in parts if part is not None)


def list_squares(
    sources: Sequence[Source],
    smallest: int,
    *,
    labels: dict[Source, LabelFile] | None = None,
    purpose: str = "training",
    least: int = MIN_PICTURES,
    warn: Callable[[str], None] = lambda _: None,
) -> list[Square]:
    """The squares of all pictures whose short side has at least ``smallest`` pixels.

    Only headers are read. Pictures too small or unreadable are left out with a warning.

    Raises:
        UsageError: fewer than ``least`` pictures remain.
    """
    squares: list[Square] = []
    small: list[tuple[int, Source, tuple[int, int]]] = []
    broken: list[str] = []
    for source in sources:
        try:
            size = read_size(source.path)
        except ImageError as error:
            broken.append(str(error))
            continue
        if min(size) < smallest:
            small.append((min(size), source, size))
            continue
        parts = 2 if max(size) >= _OBLONG * min(size) else 1
        own = (labels or {}).get(source, LabelFile(None))
        squares += [
            Square(source, size, part, parts, own.path, own.weight) for part in range(parts)
        ]
    reasons = _reasons(small, broken, smallest)
    used = len(sources) - len(small) - len(broken)
    if used < least:
        found = ", ".join([f"{len(sources)} given", *reasons])
        raise UsageError(
            f"{purpose} needs at least {least} usable pictures and has {used}: {found}; give more "
            "or larger pictures" + (", or a smaller --image-size" if small else "")
        )
    for reason in reasons:
        warn(f"{purpose}: {reason}; left out")
    return squares


def _reasons(small: list, broken: list[str], smallest: int) -> list[str]:
    """Why pictures are left out, in words."""
    reasons = []
    if small:
        _, source, size = min(small, key=lambda found: found[0])
        reasons.append(f"{_count(small)} too small (under {smallest} pixels; {source} has "
                       f"{size[1]}x{size[0]})")  # fmt: skip
    if broken:
        reasons.append(f"{_count(broken)} unreadable ({broken[0]})")
    return reasons


def _count(pictures: Sequence[object]) -> str:
    return f"{len(pictures)} picture is" if len(pictures) == 1 else f"{len(pictures)} pictures are"


def split_squares(squares: Sequence[Square], share: float) -> tuple[list[Square], list[Square]]:
    """Keep some pictures, evenly spread, for validation: ``(training, held out)`` squares."""
    sources = list(dict.fromkeys(square.source for square in squares))
    count = min(max(1, round(share * len(sources))), _MOST_VALIDATION_SQUARES, len(sources) - 1)
    places = ((np.arange(count) + 0.5) * len(sources) / count).astype(int)
    held = {sources[i] for i in places} if share > 0 else set()
    return (
        [square for square in squares if square.source not in held],
        validation_squares(square for square in squares if square.source in held),
    )


def validation_squares(squares: Iterator[Square] | Sequence[Square]) -> list[Square]:
    """One square of each picture, of at most 32 pictures, evenly spread."""
    first = [square for square in squares if square.part == 0]
    if len(first) <= _MOST_VALIDATION_SQUARES:
        return first
    places = np.linspace(0, len(first) - 1, _MOST_VALIDATION_SQUARES).round().astype(int)
    return [first[i] for i in places]


class Pictures:
    """Decodes squares, and keeps as many as ``keep_bytes`` hold. Safe to call from threads.

    Args:
        side: S, of every square.
        regions: also find the regions.
        warn: told once about each picture that cannot be decoded; another takes its place.
    """

    def __init__(
        self,
        squares: Sequence[Square],
        side: int,
        *,
        regions: bool,
        keep_bytes: int,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.squares, self.side, self.regions = list(squares), side, regions
        self.warn = warn
        self._left = keep_bytes
        self._kept: dict[int, Loaded] = {}
        self._bad: set[Source] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.squares)

    def load(self, index: int) -> Loaded:
        """Square ``index``, or the next one that can be decoded.

        Raises:
            ImageError: none can.
        """
        for step in range(len(self.squares)):
            i = (index + step) % len(self.squares)
            loaded = self._kept.get(i)
            if loaded is not None:
                return loaded
            try:
                return self._keep(i, self._decode(self.squares[i]))
            except ImageError as error:
                self._skip(self.squares[i].source, error)
        raise ImageError("not one of the pictures can be decoded")

    def _keep(self, index: int, loaded: Loaded) -> Loaded:
        with self._lock:
            if index not in self._kept and loaded.bytes <= self._left:
                self._left -= loaded.bytes
                self._kept[index] = loaded
        return loaded

    def _skip(self, source: Source, error: ImageError) -> None:
        with self._lock:
            known = source in self._bad
            self._bad.add(source)
        if not known:
            self.warn(f"{error}; left out")

    def _decode(self, square: Square) -> Loaded:
        def wanted(size: tuple[int, int]) -> tuple[int, int]:
            scale = self.side / min(size)
            return tuple(max(self.side, round(n * scale)) for n in size)

        pixels, size = read_picture(square.source.path, wanted)
        height, width = wanted(size)
        cut = self._cut(resize(pixels, (height, width)), square)
        labels = None
        if square.labels is not None:
            found = Image.fromarray(read_labels(square.labels, size))
            nearest = found.resize((width, height), Image.Resampling.NEAREST)
            labels = self._cut(np.asarray(nearest), square)
        regions = find_regions(cut) if self.regions else None
        return Loaded(cut, regions, labels, square.label_weight)

    def _cut(self, array: np.ndarray, square: Square) -> np.ndarray:
        room = [n - self.side for n in array.shape[:2]]
        share = (0.5,) if square.parts == 1 else (0.0, 1.0)
        top, left = (round(n * share[square.part]) for n in room)
        return array[top : top + self.side, left : left + self.side].copy()
