"""Ctrl-C while steps are done."""

from __future__ import annotations

import signal
import threading
from typing import Any


class Interruption:
    """While it lasts, Ctrl-C and SIGTERM only raise a flag: a step is done or not, never by half.

    Args:
        at_once_when_repeated: the second Ctrl-C interrupts as usual. Not with several processes,
            which get each signal more than once, from the terminal and from torchrun.
    """

    def __init__(self, *, at_once_when_repeated: bool) -> None:
        self.asked = False
        self._repeatable = at_once_when_repeated
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        # Signals can be handled in the main thread only; elsewhere they are not ours to handle.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._raise_flag)
        return self

    def _raise_flag(self, *_: object) -> None:
        if self.asked and self._repeatable:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
