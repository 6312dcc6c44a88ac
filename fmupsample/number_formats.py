"""Names of number formats. Imports nothing, so that the command line can check them at once."""

from __future__ import annotations

_PYTORCH = {
    "float32": "fp32",
    "float": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
}


def number_format(name: object) -> str:
    """``fp32``, ``bf16`` or ``fp16``, also from PyTorch's names and dtypes; others as they are."""
    plain = str(name).strip().lower().removeprefix("torch.")
    return _PYTORCH.get(plain, plain)
