"""What a process of its own allocates; apart from the tests, so that it imports little."""

from __future__ import annotations

from collections.abc import Callable

import torch


def allocation(megabytes: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """A small allocation and one of ``megabytes`` (2**20 bytes), for ``process_peak``."""
    return (lambda: torch.ones(10), lambda: torch.ones(megabytes << 18))
