"""A compiled library on disk, and the file beside it that says what it was made from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fmupsample.atomic import replacing


@dataclass(frozen=True)
class Library:
    """A compiled library and what is known of it.

    Attributes:
        targets: architectures it holds, as nvcc names them.
        key: of the sources, flags and PyTorch it was made from.
        torch: the version of that PyTorch.
        seconds: how long it took to compile.
        fresh: whether it was compiled by this call.
    """

    path: Path
    targets: tuple[str, ...]
    key: str
    torch: str
    seconds: float
    fresh: bool = False

    def save_facts(self, path: Path) -> None:
        facts = {
            "key": self.key,
            "targets": list(self.targets),
            "torch": self.torch,
            "cuda": torch.version.cuda,
            "bytes": self.path.stat().st_size,
            "seconds": round(self.seconds, 1),
        }
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(facts, indent=2) + "\n")


def read_library(path: Path, facts: Path) -> Library | None:
    """The library at ``path``, or ``None`` if it is not whole."""
    known = read_json(facts)
    try:
        if path.stat().st_size != known["bytes"]:
            return None
        return Library(
            path, tuple(known["targets"]), known["key"], known["torch"], float(known["seconds"])
        )
    except (OSError, KeyError, TypeError, ValueError):
        return None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of ours; empty where there is none, or none that can be read."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
