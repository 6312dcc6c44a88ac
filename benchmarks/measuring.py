"""Time and peak memory of functions: interleaved rounds, quartiles, fresh processes.

Two numbers are comparable when they were taken in one call of :func:`time_cases`: every round runs
every case once, in a new random order, so that a slow minute of the machine hits all of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from fmupsample.device import is_out_of_memory

from machine import cache_bytes

Case = Callable[[], object]
LEAST_ROUNDS = 3
# On a CPU a call that takes longer than this is not preceded by an untimed one.
SETTLED_SECONDS = 5.0
# Calls of which the largest peak counts, and the seconds after which there is no further one.
PEAK_CALLS, PEAK_SECONDS = 5, 5.0


def time_cases(
    cases: dict[str, Case],
    rounds: int,
    device: torch.device,
    *,
    seconds: float | None = None,
    warm_up: bool = True,
) -> tuple[dict[str, dict], dict[str, str]]:
    """Run every case ``rounds`` times after a warm-up, interleaved.

    Args:
        seconds: where given, fewer rounds are run (three at least) if they would take longer.
        warm_up: ``False`` for calls of minutes, which would take twice as long.

    Returns:
        ``{name: {"median_s", "quartiles_s", "rounds"}}``, on a GPU with ``"peak_bytes"``, and
        ``{name: reason}`` for the cases that ran out of memory.
    """
    clock = _Clock(device)
    skipped: dict[str, str] = {}
    times: dict[str, list[float]] = {name: [] for name in cases}
    peaks: dict[str, int] = {}
    settle: dict[str, bool] = dict.fromkeys(cases, False)
    round_seconds = 0.0
    for name, case in cases.items() if warm_up else ():
        start = time.perf_counter()
        try:
            first = clock.once(case)
            if device.type == "cuda":  # the second call: libraries have their workspaces by now
                peaks[name] = cuda_peak(case, device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            skipped[name] = "out of memory"
            del times[name]
            continue
        settle[name] = device.type == "cpu" and first <= SETTLED_SECONDS
        round_seconds += (time.perf_counter() - start) * (2 if settle[name] else 1)
    if seconds is not None and round_seconds:
        rounds = max(min(rounds, LEAST_ROUNDS), min(rounds, int(seconds / round_seconds)))
    order = list(times)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            times[name].append(clock.once(cases[name], settle[name]))
    result = {}
    for name, values in times.items():
        result[name] = summary(values)
        if name in peaks:
            result[name]["peak_bytes"] = peaks[name]
    return result, skipped


def summary(values: list[float]) -> dict:
    """Median and quartiles, of seconds."""
    low, median, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values
    )
    return {"median_s": median, "quartiles_s": [low, high], "rounds": len(values)}


class _Clock:
    """Seconds of one call, in a state that other cases have no part in.

    On a CPU freed memory goes back to the system first: a call that happens to find the pages of
    another case is up to five times faster. An untimed call may follow, so that what a loop over
    pictures would find again is found again. A large result is new memory in every call, as it is
    in such a loop, and taking it is part of the time; freeing it is not.

    On a GPU the last-level cache is emptied first, and the time is that between two events. The
    emptying takes the GPU long enough that the host can queue most of a call's kernels behind it;
    where the host is slower than that, the GPU's waiting is part of the time, as it is for a user.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush = torch.empty(4 * cache_bytes(device), dtype=torch.uint8, device=device)

    def once(self, case: Case, settle: bool = False) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.flush.zero_()
            self.start.record()
            kept = case()
            self.end.record()
            torch.cuda.synchronize(self.device)
            del kept
            return self.start.elapsed_time(self.end) / 1e3
        _trim()
        if settle:
            case()
        self._synchronize()
        start = time.perf_counter()
        kept = case()
        self._synchronize()
        elapsed = time.perf_counter() - start
        del kept
        return elapsed

    def _synchronize(self) -> None:
        if self.device.type == "mps":
            torch.mps.synchronize()


def cuda_peak(case: Case, device: torch.device) -> int:
    """By how many bytes a call raises the memory in use, its result included."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    kept = case()
    torch.cuda.synchronize(device)
    del kept
    return torch.cuda.max_memory_allocated(device) - before


def process_peak(prepare: Callable[..., tuple[Case, Case]], *arguments: object) -> int:
    """By how many bytes a call raises the resident memory of a fresh process, result included.

    The largest of some calls: where the C library finds room for what it is asked for differs from
    call to call.

    ``prepare(*arguments)`` runs in the new process, must be importable there, and returns two
    functions: a small one that makes every library load what it needs, and the one to measure.

    Raises:
        RuntimeError: the process failed or was killed.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_peak_here, prepare, arguments).result()


def _peak_here(prepare: Callable[..., tuple[Case, Case]], arguments: tuple) -> int:
    small, call = prepare(*arguments)
    small()
    gc.collect()
    largest = 0
    start = time.perf_counter()
    for _ in range(PEAK_CALLS):
        _trim()
        _reset_peak()
        before = _status("VmRSS")
        kept = call()
        largest = max(largest, _status("VmHWM") - before)
        del kept
        if time.perf_counter() - start > PEAK_SECONDS:
            break
    return largest


def _trim() -> None:
    """Give freed memory back, so that the call cannot use it without being seen."""
    with contextlib.suppress(AttributeError, OSError):  # where it is not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> None:
    """Let the peak start at the present; where the kernel refuses, it is that of the process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
