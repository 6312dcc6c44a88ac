"""Cases for processes of their own; apart from the tests, so that they import little."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch


def allocation(megabytes: int) -> Callable[[], object]:
    """Takes so many times 2**20 bytes."""
    return lambda: torch.ones(megabytes << 18)


def broken() -> Callable[[], object]:
    """Cannot be prepared."""
    raise ZeroDivisionError


def ending() -> Callable[[], object]:
    """Ends its process, as the system does to one that takes too much memory."""
    return lambda: os._exit(9)
