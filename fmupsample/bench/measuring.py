"""Time and peak memory of calls: interleaved rounds, quartiles, a process a case on the CPU.

Two numbers are comparable when they were taken in one call of :func:`time_cases`: every round runs
every case once, in a new random order, so that a slow minute of the machine hits all of them.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch

from fmupsample.bench.machine import cache_bytes
from fmupsample.device import is_out_of_memory
from fmupsample.heap import return_freed

Case = Callable[[], object]
LEAST_ROUNDS = 3
SETTLED_SECONDS = 1.0
# Calls of which the largest peak counts, and the seconds after which there is no further one.
PEAK_CALLS, PEAK_SECONDS = 5, 5.0


class OutOfMemory(Exception):
    """A case does not fit: the allocator said so, or the system ended its process."""


class Runner(Protocol):
    """Something that runs one case. Both methods raise :class:`OutOfMemory`."""

    def seconds(self) -> float:
        """Run it once, the time of it."""

    def peak(self) -> int:
        """Run it, by how many bytes it raises the memory in use, its result included."""


def time_cases(
    runners: Mapping[str, Runner],
    rounds: int,
    *,
    seconds: float | None = None,
    warm_up: bool = True,
    peaks: Callable[[str], bool] = lambda name: False,
    kept: dict[str, list[float]] | None = None,
    called: Callable[[], None] = lambda: None,
) -> tuple[dict[str, dict], dict[str, str]]:
    """Run every case ``rounds`` times after a warm-up, interleaved.

    Args:
        seconds: where given, no further round is begun after so long (three are at least).
        warm_up: ``False`` for calls of minutes, which would take twice as long.
        peaks: of which cases to measure the memory, after the rounds.
        kept: where given, the seconds are put here as they come: what an interrupted run has.
        called: is told after each call, warm-ups and those for memory included.

    Returns:
        ``{name: {"median_s", "quartiles_s", "rounds", "peak_bytes"}}``, and ``{name: reason}`` for
        the cases that ran out of memory.
    """
    times: dict[str, list[float]] = {} if kept is None else kept
    times.update({name: [] for name in runners})
    skipped: dict[str, str] = {}
    for name in runners if warm_up else ():
        try:
            runners[name].seconds()
        except OutOfMemory as error:
            skipped[name] = str(error)
            del times[name]
        called()
    order = list(times)
    shuffle = random.Random(0).shuffle
    begun = time.perf_counter()
    for done in range(rounds):
        if seconds and done >= LEAST_ROUNDS and time.perf_counter() - begun > seconds:
            break
        shuffle(order)
        for name in [n for n in order if n in times]:
            try:
                times[name].append(runners[name].seconds())
            except OutOfMemory as error:
                skipped[name] = str(error)
                del times[name]
            called()
    rows = {name: summary(values) for name, values in times.items()}
    for name in filter(peaks, rows):
        try:
            rows[name]["peak_bytes"] = runners[name].peak()
        except OutOfMemory as error:
            skipped[f"peak of {name}"] = str(error)
        called()
    return rows, skipped


def summary(values: list[float]) -> dict:
    """Median and quartiles, of seconds."""
    low, median, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values
    )
    return {"median_s": median, "quartiles_s": [low, high], "rounds": len(values)}


class Here:
    """Runs a case in this process.

    On a GPU the last-level cache is emptied first, and the time is that between two events. The
    emptying takes the GPU long enough that the host can queue most of a call's kernels behind it;
    where the host is slower than that, the GPU's waiting is part of the time, as it is for a user.

    Args:
        settle: on a CPU, run the case untimed just before every call but the first, where that
            took less than a second: threads are awake and caches warm then, as in a loop.
    """

    def __init__(self, case: Case, device: torch.device, *, settle: bool = False):
        self.case, self.device, self.settle = case, device, settle
        self._short = False

    def seconds(self) -> float:
        with _memory_errors():
            if self.device.type == "cuda":
                return self._between_events()
            if self.settle and self._short:
                self.case()
            self._synchronize()
            start = time.perf_counter()
            kept = self.case()
            self._synchronize()
            elapsed = time.perf_counter() - start
            del kept
            self._short = elapsed < SETTLED_SECONDS
            return elapsed

    def _between_events(self) -> float:
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

    def _synchronize(self) -> None:
        if self.device.type == "mps":
            torch.mps.synchronize()

    def peak(self) -> int:
        if self.device.type != "cuda":
            return peak_of(self.case)
        with _memory_errors():
            torch.cuda.synchronize(self.device)
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            kept = self.case()
            torch.cuda.synchronize(self.device)
            del kept
            return torch.cuda.max_memory_allocated(self.device) - before


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

    def __init__(self, prepare: Callable[..., Case], *arguments: object, settle: bool = True):
        if "forkserver" in multiprocessing.get_all_start_methods():
            # A server that has imported torch, and nothing else, forks quickly and has no threads.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["torch", "timm", "fmupsample.upsamplers"])
        else:  # Windows
            context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        threads = torch.get_num_threads()
        self._process = context.Process(
            target=_serve, args=(theirs, threads, settle, prepare, arguments), daemon=True
        )
        with _not_from_here():
            self._process.start()
        theirs.close()
        try:
            self._answer()
        except BaseException:
            self.close(kill=True)
            raise

    def seconds(self) -> float:
        return self._ask("seconds")

    def peak(self) -> int:
        return int(self._ask("peak"))

    def _ask(self, what: str) -> float:
        try:
            self._pipe.send(what)
        except BrokenPipeError:
            raise OutOfMemory("its process was ended") from None
        return self._answer()

    def _answer(self) -> float:
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise OutOfMemory("its process was ended") from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self, *, kill: bool = False) -> None:
        """End the process, at once or when it is done with what it does."""
        self._pipe.close()  # the process ends when it finds nobody there
        if not kill:
            self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(10)

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


def _serve(
    pipe, threads: int, settle: bool, prepare: Callable[..., Case], arguments: tuple
) -> None:
    """The process of :class:`Apart`: answer until nobody asks."""
    torch.set_num_threads(threads)
    # Ctrl-C is for the process that asks; it ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # where memory runs out, this process is the one to go
        Path("/proc/self/oom_score_adj").write_text("1000")
    runner, answer = None, None
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            try:
                if runner is None:
                    with _memory_errors():
                        runner = Here(prepare(*arguments), torch.device("cpu"), settle=settle)
                    answer = 0
                else:
                    answer = getattr(runner, pipe.recv())()
            except (EOFError, BrokenPipeError):
                return
            except Exception as error:
                answer = error
            pipe.send(answer)
            if runner is None:
                return


@contextlib.contextmanager
def _memory_errors():
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory("out of memory") from None


def peak_of(case: Case) -> int:
    """By how many bytes a call raises the resident memory of this process, result included.

    The largest of some calls: where the C library finds room for what it is asked for differs from
    call to call. Libraries should have been loaded by a call before.
    """
    gc.collect()
    largest = 0
    start = time.perf_counter()
    for _ in range(PEAK_CALLS):
        return_freed()  # so that the call cannot use it without being seen
        _reset_peak()
        before = _status("VmRSS")
        with _memory_errors():
            kept = case()
        largest = max(largest, _status("VmHWM") - before)
        del kept
        if time.perf_counter() - start > PEAK_SECONDS:
            break
    return largest


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
    try:
        import resource
    except ImportError:  # Windows: nothing is known
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
