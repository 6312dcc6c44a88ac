"""Between the two passes over many pictures, and between drawing and the disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from fmupsample.errors import FmupsampleError
from fmupsample.images.find import Source
from fmupsample.pipeline import Item, Pipeline
from fmupsample.threads import compute_alone, turn_length
from fmupsample.visualization.draw import Drawing, Point


class FeatureCache:
    """Features of the first pass for the second, as far as they fit."""

    def __init__(self, pipeline: Pipeline, limit: int) -> None:
        self.pipeline, self.left = pipeline, limit
        self._kept: dict[Source, Item] = {}

    def add(self, item: Item) -> None:
        """Keep this item if there is room."""
        features = item.features.half()
        if not torch.isfinite(features).all():
            return  # beyond the range of half precision: better computed again than clipped
        size = features.numel() * 2 + item.canvas.nbytes
        if size > self.left:
            self.left = 0  # the first pictures are kept: drawing goes in the same order
            return
        self.left -= size
        self._kept[item.source] = Item(
            item.source, item.frame, item.canvas, features.cpu(), torch.empty(0), item.window,
            item.stamp,
        )  # fmt: skip

    def items(
        self, sources: Sequence[Source], *, on_error: Callable[[Source, FmupsampleError], None]
    ) -> Iterator[Item]:
        """The items of these sources: kept ones first, then those computed again."""
        others = [source for source in sources if source not in self._kept]
        for source in sources:
            if (kept := self._kept.pop(source, None)) is not None:
                kept.features = kept.features.to(self.pipeline.device).float()
                kept.guidance = self.pipeline.guidance(kept.canvas, kept.window)
                yield kept
        yield from self.pipeline.items(others, on_error=on_error)


class Saver:
    """Draws, encodes and writes in other threads than the one that computes.

    In one thread while the next picture is computed, and a few wait; or in turns with the user.

    Args:
        save: called in those threads.
        saved: called in the thread of the user of this class, with the path or the error.
        in_turns: how many to save at once, while the user waits, whenever a few times as many have
            come; 0: one, beside the user.
    """

    def __init__(
        self,
        save: Callable[[Source, Callable[[], Drawing], Point | None], Path],
        saved: Callable[[Source, Path | FmupsampleError], None],
        in_turns: int = 0,
    ) -> None:
        self._save, self._saved, self._in_turns = save, saved, in_turns
        self._collected: list[tuple[Source, Callable[[], Drawing], Point | None]] = []
        self._largest = 0
        self._waiting: deque[tuple[Source, Future[Path]]] = deque()
        self._pool = ThreadPoolExecutor(
            max(1, in_turns), thread_name_prefix="save", initializer=compute_alone
        )

    def __enter__(self) -> Saver:
        return self

    def put(
        self, source: Source, drawing: Callable[[], Drawing], point: Point | None, size: int = 0
    ) -> None:
        """Save soon, and hear about earlier ones; ``size``: bytes that wait with it."""
        if self._in_turns:
            self._collected.append((source, drawing, point))
            self._largest = max(self._largest, size)
            if len(self._collected) >= turn_length(self._in_turns, self._largest):
                self._finish()
            return
        while len(self._waiting) >= 3:
            self._hear()
        self._begin(source, drawing, point)

    def _begin(self, source: Source, drawing: Callable[[], Drawing], point: Point | None) -> None:
        self._waiting.append((source, self._pool.submit(self._save, source, drawing, point)))

    def _finish(self) -> None:
        """Save all that is left, and hear about it."""
        for one in self._collected:
            self._begin(*one)
        self._collected.clear()
        while self._waiting:
            self._hear()

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _hear(self) -> None:
        source, future = self._waiting.popleft()
        try:
            result: Path | FmupsampleError = future.result()
        except FmupsampleError as error:
            result = error
        self._saved(source, result)
