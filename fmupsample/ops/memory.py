"""Where results are written: their memory format, and the pages they lie on."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import lru_cache

import torch
from torch import Tensor

# Below this the page faults saved are not worth asking.
_LARGE_BYTES = 8 << 20


def map_format(like: Tensor) -> torch.memory_format:
    """The memory format of a result made from ``like`` ``[B, V, h, w]``.

    Channels-last where ``like`` is channels-last and nothing else, contiguous otherwise. The
    operators and their fake twins share this rule, so that compiled code knows the strides.
    """
    last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def empty_map(like: Tensor, height: int, width: int) -> Tensor:
    """An uninitialised ``[B, V, height, width]`` for a result made from ``like`` ``[B, V, h, w]``.

    In the dtype and :func:`map_format` of ``like``.
    """
    out = torch.empty(
        (*like.shape[:2], height, width),
        dtype=like.dtype,
        device=like.device,
        memory_format=map_format(like),
    )
    return on_huge_pages(out)


def on_huge_pages(fresh: Tensor) -> Tensor:
    """Ask for huge pages behind a large tensor that nobody has touched yet; returns it.

    The first touch of a page costs a trip to the kernel: for a map of 300 MB in pages of 4 kB that
    takes as long as computing it. Linux gives pages of 2 MB to those who ask, in its usual setting.
    Only a hint: elsewhere, and where it is refused, nothing happens.
    """
    if torch.compiler.is_compiling() or not _has_memory(fresh):
        return fresh
    advise = _madvise()
    size = fresh.numel() * fresh.element_size()
    if advise is None or fresh.device.type != "cpu" or size < _LARGE_BYTES:
        return fresh
    first = -(-fresh.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (fresh.data_ptr() + size) // mmap.PAGESIZE * mmap.PAGESIZE
    advise(first, last - first, mmap.MADV_HUGEPAGE)
    return fresh


def _has_memory(x: Tensor) -> bool:
    """Whether there are numbers behind ``x``: not in what only stands for a tensor in tracing."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.device.type != "meta"


@lru_cache(maxsize=1)
def _madvise():
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise
