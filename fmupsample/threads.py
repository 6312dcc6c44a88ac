"""Threads beside the one that runs the models."""

from __future__ import annotations

import os
import threading

import torch

_LOCK = threading.Lock()


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


def cores() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
