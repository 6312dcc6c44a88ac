"""Choosing what computes the operators, and saying what does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fmupsample.ops import backend

asked = "auto"  # what was chosen last, for processes that are to do the same


def choose(name: str) -> None:
    """``"auto"``, or a name that ``fmupsample.ops.backend.set_backend`` knows.

    Raises:
        SystemExit: this version has nothing to choose from.
    """
    global asked
    setter = getattr(backend, "set_backend", None)
    if setter is not None:
        setter(name)
    elif name not in ("auto", "torch"):
        raise SystemExit(f"error: this version has no backend {name!r}, only plain PyTorch")
    asked = name


@contextmanager
def chosen(name: str) -> Iterator[None]:
    before = asked
    choose(name)
    try:
        yield
    finally:
        choose(before)


def in_use(device: torch.device) -> str:
    """What computes on ``device``: ``"torch"`` is plain PyTorch."""
    name = backend.implementation(device).__name__.rpartition(".")[2]
    return "torch" if name == "plain" else name
