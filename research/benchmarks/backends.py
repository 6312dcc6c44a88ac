"""Choosing what computes the operators, and saying what does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fmupsample.ops import backend

asked = "auto"  # what was chosen last, for processes that are to do the same


def choose(name: str) -> None:
    """One of ``fmupsample.ops.backend.BACKENDS``."""
    global asked
    backend.set_backend(name)
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
