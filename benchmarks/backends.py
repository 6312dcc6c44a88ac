"""Choosing what computes the operators, and saying what does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fmupsample.ops import backend


def choose(name: str) -> None:
    """``"auto"``, or a name that ``fmupsample.ops.backend.set_backend`` knows.

    Raises:
        SystemExit: this version has nothing to choose from.
    """
    setter = getattr(backend, "set_backend", None)
    if setter is not None:
        setter(name)
    elif name not in ("auto", "torch"):
        raise SystemExit(f"error: this version has no backend {name!r}, only plain PyTorch")


@contextmanager
def chosen(name: str, then: str = "auto") -> Iterator[None]:
    choose(name)
    try:
        yield
    finally:
        choose(then)


def in_use(device: torch.device) -> str:
    """What computes on ``device``: ``"torch"`` is plain PyTorch."""
    name = backend.implementation(device).__name__.rpartition(".")[2]
    return "torch" if name == "tiled" else name
