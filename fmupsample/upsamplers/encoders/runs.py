"""Runs of neighbouring pixels that attend to the same cells, along one axis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


def tables(cells: Tensor, own: Tensor) -> tuple[Tensor, tuple[int, ...], Tensor, Tensor]:
    """The attributes of :class:`Runs`; compiled code can take these as constants, but not objects.

    A run ends where the pixels' own cell does, too: so runs are about as long as each other.

    Args:
        cells: int64 ``[pixels, K]``, what each pixel attends to.
        own: int64 ``[pixels]``, the cell that each lies in.
    """
    told_apart = torch.cat([cells, own[:, None]], 1)
    changes = (told_apart[1:] != told_apart[:-1]).any(1).nonzero().flatten() + 1
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), changes])
    lengths = torch.diff(starts, append=torch.tensor([len(own)]))
    longest = int(lengths.max())
    slots = (starts[:, None] + torch.arange(longest)).clamp_max(len(own) - 1).flatten()
    run = torch.repeat_interleave(torch.arange(len(starts)), lengths)
    filled = run * longest + torch.arange(len(own)) - starts[run]
    return cells[starts], (*starts.tolist(), len(own)), slots, filled


@dataclass(eq=False)
class Runs:
    """All pixels of an axis, run by run.

    For products of many runs at once, each is laid out on as many slots as the longest one has
    pixels; the last slots of a shorter one are idle.

    Attributes:
        cells: int64 ``[runs, K]``, the cells that a run attends to.
        starts: the first pixel of each run, and the number of pixels at the end.
        slots: int64 ``[runs * longest]``, the pixel on each slot.
        filled: int64 ``[pixels]``, the slot of each pixel.
    """

    cells: Tensor
    starts: tuple[int, ...]
    slots: Tensor
    filled: Tensor

    @property
    def idle(self) -> bool:
        """Whether there are idle slots."""
        return len(self.slots) != len(self.filled)

    def run_of(self, pixel: int) -> int:
        """The number of the run that a pixel is in."""
        return sum(start <= pixel for start in self.starts) - 1

    def parts(self, pixels: slice, most: int) -> Iterator[slice]:
        """These pixels in parts of at most so many, each within a run."""
        for first, last in zip(self.starts[:-1], self.starts[1:], strict=True):
            for start in range(max(first, pixels.start), min(last, pixels.stop), most):
                yield slice(start, min(start + most, last, pixels.stop))
