"""How much memory there is, and how much of it a person allows."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import torch

from fmupsample.distributed import processes_here
from fmupsample.errors import UsageError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_LEAST = 64 * 10**6


def parse_memory(text: str | int) -> int:
    """Bytes, from ``"4GB"``, ``"500 MB"``, ``"1.5G"`` or a number of bytes; powers of 1000.

    Raises:
        UsageError: anything else, or less than 64 MB, with which nothing can be done.
    """
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([kmgt]?)i?b?", str(text).strip().lower())
    if found is None:
        raise UsageError(f"memory {text!r} is not understood: give 4GB, 500MB, or bytes")
    size = int(float(found[1]) * _UNITS[found[2]])
    if size < _LEAST:
        raise UsageError(f"memory of {text} is too little to work with: give at least 64MB")
    return size


def available_memory(device: torch.device) -> int | None:
    """Bytes that could be had on ``device`` now; ``None`` where nobody says.

    Processes of one run that share the machine share its memory.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [n for n in (_of_system(), _of_group()) if n is not None]
    return min(found) // processes_here() if found else None


def _of_system() -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _of_group() -> int | None:
    """What a container may still take (cgroup v2)."""
    folder = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        most = int((folder / "memory.max").read_text())
        return max(0, most - int((folder / "memory.current").read_text()))
    return None
