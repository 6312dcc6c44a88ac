"""How long work reports on itself, without the library knowing about terminals.

The library calls a ``Progress``; the command line passes one that draws a bar, a notebook may pass
its own, and ``SILENT`` is used when nobody listens.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of one piece of long work. All methods are called from one thread."""

    def start(self, total: int, label: str) -> None:
        """Begin a stage of ``total`` steps, e.g. ``start(120, "upsampling")``."""

    def advance(self, steps: int = 1) -> None:
        """``steps`` more steps of the current stage are done."""

    def describe(self, label: str) -> None:
        """Rename the current stage, to tell how it is going: ``describe("training, loss 0.8")``."""

    def warn(self, message: str) -> None:
        """Say something the user should read now, without stopping."""


class _Silent:
    def start(self, total: int, label: str) -> None:
        pass

    def advance(self, steps: int = 1) -> None:
        pass

    def describe(self, label: str) -> None:
        pass

    def warn(self, message: str) -> None:
        pass


SILENT: Progress = _Silent()
