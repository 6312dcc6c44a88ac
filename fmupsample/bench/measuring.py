"""Time and peak memory of calls: interleaved rounds, quartiles, a process a case on the CPU.

Two numbers are comparable when they were taken in one call of :func:`time_cases`: every round runs
every case once, in a new random order, so that a slow minute of the machine hits all of them.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fmupsample.bench.machine import cache_bytes
from fmupsample.bench.memory import peak_of
from fmupsample.device import is_out_of_memory

if TYPE_CHECKING:
    from torch.utils.benchmark import Timer

Case = Callable[[], object]
LEAST_ROUNDS = 3


class OutOfMemory(Exception):
    """A case does not fit: the allocator said so, or the system ended its process."""


def time_cases(
    runners: Mapping[str, Here | Apart],
    rounds: int,
    *,
    seconds: float | None = None,
    peaks: Callable[[str], bool] = lambda name: False,
    kept: dict[str, list[float]] | None = None,
    called: Callable[[], None] = lambda: None,
) -> tuple[dict[str, dict], dict[str, str]]:
    """Time every case ``rounds`` times, interleaved.

    Args:
        seconds: where given, no further round is begun after so long (three are at least).
        peaks: of which cases to measure the memory, after the rounds.
        kept: where given, the seconds are put here as they come: what an interrupted run has.
        called: is told after each measurement, of time or of memory.

    Returns:
        ``{name: {"median_s", "quartiles_s", "rounds", "peak_bytes"}}``, and ``{name: reason}`` for
        the cases that ran out of memory.
    """
    times = {} if kept is None else kept
    times.update({name: [] for name in runners})
    skipped: dict[str, str] = {}

    def measured(call: Callable[[], float], name: str) -> float | None:
        try:
            return call()
        except OutOfMemory as error:
            skipped[name] = str(error)
            return None
        finally:
            called()

    generator, begun = random.Random(0), time.perf_counter()
    for done in range(rounds):
        if seconds and done >= LEAST_ROUNDS and time.perf_counter() - begun > seconds:
            break
        for name in generator.sample(list(times), len(times)):
            found = measured(runners[name].seconds, name)
            if found is None:
                del times[name]
            else:
                times[name].append(found)
    rows = {name: summary(values) for name, values in times.items()}
    for name in filter(peaks, rows):
        found = measured(runners[name].peak, f"peak of {name}")
        if found is not None:
            rows[name]["peak_bytes"] = found
    return rows, skipped


def summary(values: list[float]) -> dict:
    """Median and quartiles, of seconds."""
    low, median, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values
    )
    return {"median_s": median, "quartiles_s": [low, high], "rounds": len(values)}


class Here:
    """Runs a case in this process.

    Before the call that is timed there is another: threads are awake and caches warm, as in a loop.
    On a GPU the last-level cache is emptied in between, and the time is that between two events.
    The emptying takes the GPU long enough that the host can queue most of a call's kernels behind
    it; where the host is slower than that, the GPU's waiting is part of the time, as for a user.
    """

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device = case, device

    def seconds(self) -> float:
        """The time of one call.

        Raises:
            OutOfMemory: it does not fit.
        """
        with _memory_errors():
            if self.device.type == "cuda":
                return self._between_events()
            timer = _timer()(
                "kept = case()",  # freeing the result is not part of the time
                globals={"case": self.case},
                timer=_mps_clock if self.device.type == "mps" else time.perf_counter,
                num_threads=torch.get_num_threads(),
            )
            # The least that it does: one call to warm up, one that is timed.
            return timer.blocked_autorange(min_run_time=0).median

    def _between_events(self) -> float:
        self.case()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush = torch.empty(4 * cache_bytes(self.device), dtype=torch.uint8, device=self.device)
        torch.cuda.synchronize(self.device)
        flush.zero_()
        start.record()
        kept = self.case()
        end.record()
        torch.cuda.synchronize(self.device)
        del kept
        return start.elapsed_time(end) / 1e3

    def peak(self) -> int:
        """By how many bytes a call raises the memory in use, its result included.

        Raises:
            OutOfMemory: it does not fit.
        """
        with _memory_errors():
            if self.device.type != "cuda":
                return peak_of(self.case)
            torch.cuda.synchronize(self.device)
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            kept = self.case()
            torch.cuda.synchronize(self.device)
            del kept
            return torch.cuda.max_memory_allocated(self.device) - before


def _timer() -> type[Timer]:
    """PyTorch's, whose import has a remark on machines with nvcc and no GPU."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils.benchmark import Timer

    return Timer


def _mps_clock() -> float:
    torch.mps.synchronize()
    return time.perf_counter()


class Apart:
    """Runs a case on the CPU in a process of its own, which lives as long as this object.

    So what a call finds in the heap is what earlier calls of the same case left there, as in a loop
    over pictures. In a shared process a call that finds the pages of another case can be five times
    as fast. A large result is new memory in every call, and taking it is part of the time; freeing
    it is not.

    ``prepare(*arguments)`` runs in the new process, must be importable there, and returns the case.
    Use it as a context manager.

    Raises:
        OutOfMemory: the case cannot be prepared.
    """

    def __init__(self, prepare: Callable[..., Case], *arguments: object):
        if "forkserver" in multiprocessing.get_all_start_methods():
            # A server that has imported torch, and nothing else, forks quickly and has no threads.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["torch", "timm", "fmupsample.upsamplers"])
        else:  # Windows
            context = multiprocessing.get_context("spawn")
        threads = torch.get_num_threads()
        self._pool = ProcessPoolExecutor(1, context, initializer=_begin, initargs=(threads,))
        self._pid: int | None = None
        try:
            with _not_from_here():  # the process starts with the first call
                self._pid = self._ask(os.getpid)
            self._ask(_prepare, prepare, arguments)
        except BaseException:
            self.close(kill=True)
            raise

    def seconds(self) -> float:
        """As of :class:`Here`."""
        return self._ask(_run, "seconds")

    def peak(self) -> int:
        """As of :class:`Here`."""
        return self._ask(_run, "peak")

    def _ask(self, function: Callable, *arguments: object) -> Any:
        try:
            return self._pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise OutOfMemory("its process was ended") from None

    def close(self, *, kill: bool = False) -> None:
        """End the process, at once or when it is done with what it does."""
        if kill and self._pid is not None:
            with contextlib.suppress(OSError):
                os.kill(self._pid, signal.SIGTERM)
        self._pool.shutdown()

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.close(kill=kind is not None)


@contextlib.contextmanager
def _not_from_here() -> Iterator[None]:
    """New Python processes do not import modules from the current folder."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


# -- in the process of an Apart --------------------------------------------------------------------

_runner: Here | None = None


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    # Ctrl-C is for the process that asks; it ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # where memory runs out, this process is the one to go
        Path("/proc/self/oom_score_adj").write_text("1000")
    # Where the process that asks is killed, nobody would end this one.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _prepare(prepare: Callable[..., Case], arguments: tuple) -> None:
    global _runner
    with _memory_errors():
        _runner = Here(prepare(*arguments), torch.device("cpu"))


def _run(what: str) -> float:
    return getattr(_runner, what)()


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory("out of memory") from None
