"""Errors that a person can act on.

Every error a user can cause is a ``FmupsampleError``: one sentence (or a few) saying what was
wrong, where, and what to do about it. The command line prints it without a traceback and exits
with ``exit_code``.
"""

from __future__ import annotations


def one_line(text: str) -> str:
    """``text`` as a terminal may show it: control characters become ``\\n``, ``\\x1b``, ...

    What a message quotes may come from the header of any file.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class FmupsampleError(Exception):
    """Base of all errors raised on purpose; ``str(error)`` is the message for the user."""

    exit_code = 1


class RenamedWarning(FutureWarning):
    """Something was asked for by the name it had in an earlier version."""


class UsageError(FmupsampleError, ValueError):
    """An argument or option that cannot be honoured; nothing was started."""

    exit_code = 2


class ShapeError(FmupsampleError, ValueError):
    """Tensors whose shapes do not fit together (wrong rank, swapped arguments, wrong sizes)."""


class ImageError(FmupsampleError):
    """One picture that cannot be read or used; a run reports it and goes on."""


class BackboneError(FmupsampleError):
    """A backbone that cannot be built, found or downloaded, or that cannot give a feature map."""


class HeadError(FmupsampleError):
    """A head file that is missing, damaged, or made for another backbone."""


class FeaturesError(FmupsampleError):
    """A file of features that is missing, damaged, or of another version."""


class ProbeError(FmupsampleError):
    """A probe file that is missing, damaged, or made for another backbone or upsampler."""


class OutputError(FmupsampleError):
    """Results that cannot be written: no space, no permission, a folder in the way."""


class ProcessError(FmupsampleError):
    """Another process of the same run has failed or gone; finished results stay."""


class ExtensionError(FmupsampleError):
    """The compiled extension cannot be had here; plain PyTorch can.

    Attributes:
        kind: what is in the way, one word: ``"absent"`` (no sources), ``"torch"`` (a PyTorch
            without CUDA), ``"system"``, ``"gpu"``, ``"nvcc"``, ``"ninja"``, ``"compiler"`` (no C++
            compiler), ``"version"`` (nvcc and PyTorch do not match), ``"compile"``, ``"timeout"``,
            ``"cache"`` (cannot be written) or ``"load"``.
        log: file with everything the compilers said.
    """

    def __init__(self, reason: str, kind: str, log: str | None = None) -> None:
        super().__init__(reason)
        self.kind = kind
        self.log = log


class TrainingError(FmupsampleError):
    """A training run that cannot go on; its last good state is in its checkpoint."""
