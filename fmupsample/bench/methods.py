"""Which upsamplers are measured, and how each is built, also in another process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fmupsample.errors import UsageError
from fmupsample.upsamplers import registry
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.heads import BackboneLike, load_head
from fmupsample.upsamplers.loading import find_head, load_upsampler
from fmupsample.upsamplers.official.checkpoints import is_checkpoint, load_checkpoint


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: in the table: the method's, or that of the head file.
        row: the method, as it is registered.
        channels: of the features.
        head: the file with its trained parameters.
        reason: why it cannot be measured.
    """

    name: str
    row: registry.Method
    channels: int
    head: Path | None = None
    reason: str | None = None

    @property
    def weights(self) -> str:
        """``"none"`` (it has no parameters), ``"trained"`` or ``"random"``."""
        if not self.row.learned:
            return "none"
        return "random" if self.head is None else "trained"

    def build(self) -> Upsampler:
        """On the CPU, in evaluation mode; random parameters are always the same ones.

        Raises:
            HeadError: the file is damaged.
            UsageError: features of so many channels are not possible.
        """
        if self.head is not None:
            checkpoint = is_checkpoint(self.head)
            return load_checkpoint(self.head) if checkpoint else load_head(self.head)
        options = self.row.options(self.channels) if self.row.learned else {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = self.row.build(options)
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

    known = registry.upsampler_names()
    for name in known if names is None else map(registry.current_name, names):
        registry.require_in_library(name)
        if name not in known:
            raise UsageError(
                f"{name!r} is no upsampler: there are {', '.join(known)}; files go to --head"
            )
        row = registry.METHODS[name]
        head = find_head(backbone, name) if row.learned else None
        add(Method(name, row, backbone.channels, head))
    for path in heads:
        row = registry.METHODS[load_upsampler(backbone, path).name]
        add(Method(path.stem, row, backbone.channels, path))
    if not found:
        raise UsageError("nothing to measure: name --upsamplers, or give a --head")
    return list(found.values())
