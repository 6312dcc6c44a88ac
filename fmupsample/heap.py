"""What the C library does with memory that is freed."""

from __future__ import annotations

import contextlib
import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST = 32 * 2**20  # the most that glibc takes for the second
_KEPT = 512 * 2**20


def keep_freed_memory() -> bool:
    """Keep freed memory for what comes next, instead of giving it back and asking anew.

    A loop over pictures frees and takes the same few megabytes all the time. By default glibc
    returns blocks of that size to the system, and each new one costs a trip to the kernel for
    every page of 4 kB: half the time of decoding a photograph. Blocks beyond 32 MB are returned as
    ever, and of the others 512 MB at most are kept. For programs, not libraries: it concerns the
    whole process.

    Returns:
        Whether it was done: on Linux with glibc, from one thread or before others begin.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT))


def return_freed() -> None:
    """Give freed memory that the C library keeps for later back to the system.

    Pillow takes a picture's memory in pieces that glibc keeps: 14 bytes a pixel of a large one.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # where it is not glibc
        ctypes.CDLL(None).malloc_trim(0)
