"""Several processes as ``torchrun`` starts them: which is which, and where each computes.

Imports nothing heavy.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fmupsample.errors import UsageError

if TYPE_CHECKING:
    import torch


def is_distributed() -> bool:
    """Whether this process was started by ``torchrun``, with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def leads() -> bool:
    """Whether this is the only process, or the first."""
    return not is_distributed() or int(os.environ.get("RANK", "0")) == 0


def processes_here() -> int:
    """How many processes of the run share this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def own_device(device: str | torch.device) -> torch.device:
    """As :func:`fmupsample.device.resolve_device`; ``auto`` or ``cuda`` is this process's own GPU.

    Raises:
        UsageError: as there, or more processes than GPUs.
    """
    import torch

    from fmupsample.device import resolve_device

    place = resolve_device(device)
    if not is_distributed() or place.type != "cuda":
        return place
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise UsageError(
            f"process {local} has no GPU: there are {torch.cuda.device_count()}; start fewer "
            "with --nproc-per-node, or give --device cpu"
        )
    place = torch.device("cuda", local)
    torch.cuda.set_device(place)
    return place
