"""Several processes as one: the world that ``torchrun`` starts, and sums over it.

Gradients are summed by hand, once a step and in one piece: heads are small, so there is nothing to
overlap, and a process that runs out of memory can repeat its own part of a step without the others
noticing (the hooks of DistributedDataParallel would leave them waiting).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fmupsample.bench.machine import describe
from fmupsample.distributed import is_distributed, own_device


@dataclass(frozen=True)
class World:
    """This process among those of a run.

    Attributes:
        rank, size: its number, and how many there are.
        device: where it computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process writes the files and speaks to the user."""
        return self.rank == 0

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace ``tensors`` by their sums over all processes, all in one message."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.detach().float().flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.detach().copy_(part.view_as(tensor))

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Replace ``tensors`` by those of the first process."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def world(device: str | torch.device) -> Iterator[World]:
    """Join the other processes of ``torchrun``, if there are any.

    ``device`` ``auto`` or ``cuda`` becomes this process's own GPU.

    Raises:
        UsageError: more processes than GPUs.
    """
    place = own_device(device)
    if not is_distributed():
        yield World(0, 1, place)
        return
    joined_here = not dist.is_initialized()
    if joined_here:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), place)
    finally:
        if joined_here:
            dist.destroy_process_group()


def describe_hardware(here: World) -> str:
    """``2 x NVIDIA H100``, or the processor and its threads."""
    facts = describe(here.device)
    if facts["gpu"] is not None:
        name = facts["gpu"]["name"]
        return f"{here.size} x {name}" if here.size > 1 else name
    several = f" in each of {here.size} processes" if here.size > 1 else ""
    return f"{facts['cpu']}, {facts['threads']} threads{several}"
