"""Threads beside the one that runs the models."""

from __future__ import annotations

import os
import threading

import torch

_LOCK = threading.Lock()
# Of what takes turns with models: pieces a thread, and bytes, of one turn.
_PIECES, _TURN_BYTES = 4, 2**26


def compute_alone() -> None:
    """Let PyTorch use no other threads for what the calling thread computes.

    For threads that decode, draw and write beside the models. Each thread that computes in parallel
    has helpers of its own, and where threads and helpers are more than the cores, OpenMP lets all
    of them sleep at every meeting instead of waiting awake: the models, which meet thousands of
    times a picture, take half as long again.
    """
    with _LOCK:
        others = torch.get_num_threads()
        torch.set_num_threads(1)
        # That is also what threads to come begin with. It can only be set back from another thread.
        back = threading.Thread(target=torch.set_num_threads, args=(others,))
        back.start()
        back.join()


def models_take_all_cores(device: torch.device) -> bool:
    """Whether models on ``device`` leave no core of this machine to other threads.

    Then work beside them is no gain, but a loss: their threads share a layer evenly and wait for
    the slowest of them, so one core that has something else to do holds up all. Work that others
    would do beside them had better take turns with them, on all cores.
    """
    return device.type == "cpu" and torch.get_num_threads() >= cores()


def turn_length(threads: int, size: int) -> int:
    """How many pieces of work of ``size`` bytes these threads do in a turn: a few each, if small.

    For after every change the models' threads stay awake for a while, in case there is more.
    """
    return max(threads, min(_PIECES * threads, _TURN_BYTES // max(size, 1)))


def cores() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
