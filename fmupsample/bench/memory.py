"""By how much a call raises the memory of this process."""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fmupsample.heap import return_freed

# Calls of which the largest peak counts, and the seconds after which there is no further one.
PEAK_CALLS, PEAK_SECONDS = 5, 5.0


def peak_of(case: Callable[[], object]) -> int:
    """By how many bytes a call raises the resident memory of this process, result included.

    The largest of some calls: where the C library finds room for what it is asked for differs from
    call to call. Libraries should have been loaded by a call before.
    """
    gc.collect()
    largest = 0
    start = time.perf_counter()
    for _ in range(PEAK_CALLS):
        return_freed()  # so that the call cannot use it without being seen
        with contextlib.suppress(OSError):  # where it is refused, the peak is that of the process
            Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        kept = case()
        largest = max(largest, _resident("VmHWM") - before)
        del kept
        if time.perf_counter() - start > PEAK_SECONDS:
            break
    return largest


def _resident(key: str) -> int:
    found = proc_bytes(Path("/proc/self/status"), key)
    if found is not None:
        return found
    try:
        import resource
    except ImportError:  # Windows: nothing is known
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def proc_bytes(file: Path, key: str) -> int | None:
    """The bytes of a line such as ``MemTotal: 16 kB`` of /proc; ``None`` where there is none."""
    with contextlib.suppress(OSError):
        for line in file.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return None
