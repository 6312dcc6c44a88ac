"""What the thread that computes waits for in a run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import fmupsample.pipeline.features
from fmupsample.runs.writer import BackgroundWriter


class Waits:
    """``with Waits() as waits:`` seconds for which the thread that computes waits, by what for."""

    def __enter__(self) -> Waits:
        self.seconds = {"decode": 0.0, "write": 0.0}
        self._stack = contextlib.ExitStack()
        prefetch = fmupsample.pipeline.features.prefetch

        def watched(*arguments: object, **options: object) -> Iterator:
            ahead = prefetch(*arguments, **options)
            try:
                while True:
                    with self._timed("decode"):
                        found = next(ahead, None)
                    if found is None:
                        return
                    yield found
            finally:
                ahead.close()

        self._replace(fmupsample.pipeline.features, "prefetch", watched)
        for owner, name in (
            (BackgroundWriter, "_put"),
            (BackgroundWriter, "close"),
        ):
            self._replace(owner, name, self._watched(getattr(owner, name)))
        self._depth = 0
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _replace(self, owner: object, name: str, value: object) -> None:
        self._stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def _watched(self, method: Callable) -> Callable:
        def call(*arguments: object) -> object:
            with self._timed("write"):
                return method(*arguments)

        return call

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began, self._depth = time.perf_counter(), self._depth + 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:  # closing a writer puts something, too
                self.seconds[what] += time.perf_counter() - began
