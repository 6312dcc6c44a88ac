"""How one call computes: in which memory, and in which precision."""

from __future__ import annotations

from torch import Tensor

from fmupsample.ops.memory import on_huge_pages


class Workspace:
    """Memory that strips and pairs work in, one after the other.

    Fresh pages cost more than the arithmetic on them.

    Args:
        low_precision: products may be bfloat16, as the features are.
    """

    def __init__(self, low_precision: bool = False) -> None:
        self.low_precision = low_precision
        self._buffers: dict[str, Tensor] = {}

    def reserve(self, name: str, size: int, like: Tensor) -> Tensor:
        """An uninitialised ``[size]``; the same memory for the same name, size and dtype."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != like.dtype:
            buffer = self._buffers[name] = on_huge_pages(like.new_empty(size))
        return buffer
