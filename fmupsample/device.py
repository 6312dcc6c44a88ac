"""Which device computes, and in which precision."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch

from fmupsample.errors import UsageError
from fmupsample.number_formats import number_format

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """``"auto"`` (cuda, else mps, else cpu), ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"mps"``.

    Raises:
        UsageError: not a device, or one that this machine or this PyTorch does not have.
    """
    text = str(name).strip().lower()
    if text == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"device {name!r} is unknown: use auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise UsageError(
                f"device {text} is not available: PyTorch {torch.__version__} finds no usable "
                "NVIDIA GPU; use --device cpu, or install the driver and a CUDA build of PyTorch"
            )
        if (device.index or 0) >= count:
            raise UsageError(
                f"device {text} does not exist: there are {count}, cuda:0 is the first"
            )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("device mps is not available on this machine; use --device cpu")
    return device


def check_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the backbone's arithmetic.

    Raises:
        UsageError: unknown, or fp16 on the CPU, where it is slower than fp32 and overflows.
    """
    precision = number_format(precision)
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r} is unknown: use {', '.join(PRECISIONS)}")
    if precision == "fp16" and device.type == "cpu":
        raise UsageError("precision fp16 needs a GPU: on the CPU use bf16 or fp32")
    return PRECISIONS[precision]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Context in which matrix products and convolutions run in ``dtype``."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that the memory of the device, or of the machine, is exhausted."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
    )
