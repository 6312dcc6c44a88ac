"""Which upsamplers are measured, and how each is built, also in another process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fmupsample.errors import UsageError
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.catalogue import DESCRIPTIONS
from fmupsample.upsamplers.complexity import Cost, cost, stack_cost, training_free_cost
from fmupsample.upsamplers.heads import BackboneLike, load_head, read_head_metadata
from fmupsample.upsamplers.learned import LEARNED, build_learned, config_for
from fmupsample.upsamplers.loading import TRAINING_FREE, UPSAMPLERS, find_head
from fmupsample.upsamplers.stack import Stack

_IN_DECODERS = "a part of an encoder-decoder: its kernels come from the encoder's own map"


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: in the table: the method's, or that of the head file.
        method: the word for ``--upsampler``.
        channels: of the features.
        head: the file with its trained parameters.
        reason: why it cannot be measured.
    """

    name: str
    method: str
    channels: int
    head: Path | None = None
    reason: str | None = None

    @property
    def weights(self) -> str:
        """``"none"`` (it has no parameters), ``"trained"`` or ``"random"``."""
        if self.method not in LEARNED:
            return "none"
        return "random" if self.head is None else "trained"

    def build(self) -> Upsampler:
        """On the CPU, in evaluation mode; random parameters are always the same ones.

        Raises:
            HeadError: the file is damaged.
            UsageError: features of so many channels are not possible.
        """
        if self.head is not None:
            return load_head(self.head)
        if self.method in TRAINING_FREE:
            return TRAINING_FREE[self.method]().eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = build_learned(self.method, config_for(self.method, self.channels, {}))
        return made.eval().requires_grad_(False)


def choose(
    backbone: BackboneLike, names: Sequence[str] | None = None, heads: Iterable[Path] = ()
) -> list[Method]:
    """The methods called ``names`` (``None``: all that there are for a frozen backbone).

    A method with parameters has those of the backbone's shipped or cached head, where there is one,
    and random ones otherwise. Each file of ``heads`` is a row of its own, called like the file.

    Raises:
        UsageError: an unknown name, or one given twice.
        HeadError: a file that is no head, or one of another backbone.
    """
    found: dict[str, Method] = {}

    def add(method: Method) -> None:
        if method.name in found:
            raise UsageError(
                f"two upsamplers are called {method.name}: rename one, or leave it out"
            )
        found[method.name] = method

    for name in UPSAMPLERS if names is None else names:
        if name in UPSAMPLERS:
            head = find_head(backbone, name) if name in LEARNED else None
            add(Method(name, name, backbone.channels, head))
        elif name in DESCRIPTIONS:
            add(Method(name, name, backbone.channels, reason=_IN_DECODERS))
        else:
            raise UsageError(
                f"{name!r} is no upsampler: there are {', '.join(UPSAMPLERS)}; files go to --head"
            )
    for path in heads:
        load_head(path, backbone)
        kind = read_head_metadata(path)["upsampler"]
        add(Method(path.stem, kind, backbone.channels, path))
    if not found:
        raise UsageError("nothing to measure: name --upsamplers, or give a --head")
    return list(found.values())


def cost_of(
    upsampler: Upsampler, channels: int, cells: tuple[int, int], pixels: tuple[int, int]
) -> Cost:
    """Parameters and multiply-adds by formula, for one picture of this size."""
    if isinstance(upsampler, Stack):
        return stack_cost(type(upsampler), upsampler.config, cells, pixels)
    if upsampler.name in LEARNED:
        return cost(upsampler.config, cells, pixels, channels)
    return training_free_cost(upsampler.name, channels, cells, pixels)
