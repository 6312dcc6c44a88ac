"""The upsamplers that are compared: by name, from a head file, and a head with parts taken out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fmupsample.backbones import Backbone
from fmupsample.errors import UsageError
from fmupsample.upsamplers import Upsampler, load_upsampler
from fmupsample.upsamplers.aligned.module import AlignedUpsampler

# Each takes one part of ReSFU or of bilateral cells away, and keeps the trained parameters of the
# others.
ABLATIONS: dict[str, dict[str, Any]] = {
    "no-semantic": {"semantic": False},
    "no-detail": {"detail": False},
    "no-align": {"align": False},
    "inner": {"similarity": "inner"},
    "no-colours": {"sigma_range": None},
    "no-prior": {"taper": False, "sigma_space": None, "sigma_range": None},
    "no-taper": {"taper": False},
    "fine": {"neighbours": "fine"},
    "coarse": {"neighbours": "coarse"},
}


@dataclass(frozen=True)
class Contender:
    """An upsampler under the name it has in the table."""

    name: str
    upsampler: Upsampler

    def describe(self) -> dict[str, Any]:
        """What identifies it, for the JSON."""
        described = {"method": self.upsampler.name, "fingerprint": self.fingerprint}
        if isinstance(self.upsampler, AlignedUpsampler):
            described["config"] = self.upsampler.config.to_dict()
        return described

    @property
    def fingerprint(self) -> str:
        return self.upsampler.fingerprint


def named_file(text: str) -> tuple[str, Path]:
    """``"NAME=FILE"``."""
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise UsageError(f"--head {text!r} is not understood: give NAME=FILE")
    return name, Path(file)


def gather(
    backbone: Backbone,
    names: Iterable[str],
    heads: Iterable[tuple[str, Path]],
    ablated: Iterable[str],
) -> tuple[list[Contender], dict[str, str]]:
    """The contenders, and those that cannot be had with the reason.

    Args:
        names: of methods, as ``--upsampler`` takes them.
        heads: head files with the names that they should have here.
        ablated: names among these of the heads to take parts out of.
    """
    found = {name: Contender(name, load_upsampler(backbone, name)) for name in names}
    for name, file in heads:
        if name in found:
            raise UsageError(f"the name {name} is given twice: choose another for {file}")
        found[name] = Contender(name, load_upsampler(backbone, file))
    skipped: dict[str, str] = {}
    for name in ablated:
        if name not in found or not isinstance(found[name].upsampler, AlignedUpsampler):
            raise UsageError(f"--ablate {name}: that is no head of resfu or bilateral-cells")
        head = found[name].upsampler
        for part, changes in ABLATIONS.items():
            try:
                found[f"{name} {part}"] = Contender(f"{name} {part}", ablate(head, part, changes))
            except UsageError as error:
                skipped[f"{name} {part}"] = str(error)
    return list(found.values()), skipped


def ablate(head: AlignedUpsampler, part: str, changes: dict[str, Any]) -> AlignedUpsampler:
    """``head`` with another configuration and the same parameters.

    Raises:
        UsageError: it is that already, or needs parameters that the head was not trained with.
    """
    config = head.config
    missing = [key for key in changes if not hasattr(config, key)]
    if missing or all(getattr(config, key) == value for key, value in changes.items()):
        raise UsageError(f"the head has no {part} form: {changes} changes nothing in it")
    other = type(head)(replace(config, **changes))
    state, wanted = head.state_dict(), other.state_dict()
    untrained = [k for k, v in wanted.items() if k not in state or state[k].shape != v.shape]
    if untrained:
        raise UsageError(f"needs training: the head has no parameters {', '.join(untrained)}")
    other.load_state_dict({key: state[key] for key in wanted})
    other.fingerprint = f"{head.fingerprint}-{part}"
    return other.eval().requires_grad_(False)
