"""How the threads of OpenMP wait for each other. Imports nothing heavy."""

from __future__ import annotations

import os

# Rounds of a waiting loop, some microseconds in all.
_SPINS = "3000"


def spin_briefly() -> None:
    """Let OpenMP threads that wait fall asleep after some microseconds, unless the user said how.

    Upsampling is thousands of short parallel regions. GNU OpenMP's threads spin at the end of each
    for 300,000 rounds: that is quick on a quiet machine, but where other programs want the same
    cores the threads that are waited for do not run, and all becomes 20 times slower. 3,000 rounds
    bridge the gaps of a quiet machine as well (research/benchmarks/README.md). Call it before
    PyTorch is imported, in programs of one's own: it concerns the whole process.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
