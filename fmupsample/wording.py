"""Numbers in words, for messages. Imports nothing."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """``154 MB``; powers of 1000, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def counted(number: int, noun: str) -> str:
    """``1 image``, ``3 images``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
