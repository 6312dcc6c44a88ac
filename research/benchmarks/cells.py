"""The results of the quality benchmark: one cell per data set, upsampler and seed, in a JSON file.

The file is rewritten as a whole after every cell, so that a run that is stopped goes on there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from common import write_json
from fmupsample.bench.machine import describe
from fmupsample.errors import UsageError

FORMAT = "fmupsample-quality/1"


class Cells:
    """Finished cells, kept in ``path`` (``None``: nowhere).

    Args:
        settings: everything on which the numbers depend and that cells share; a file with others
            is refused.

    Raises:
        UsageError: the file is something else, or of other settings.
    """

    def __init__(self, path: Path | None, device: torch.device, settings: dict) -> None:
        self.path, self.machine = path, describe(device)
        # As they will be read back: tuples become lists.
        self.settings = json.loads(json.dumps(settings))
        self.cells: list[dict[str, Any]] = []
        self.upsamplers: dict[str, dict] = {}
        self.skipped: dict[str, str] = {}
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            report = json.loads(path.read_text())
            if report["format"] != FORMAT:
                raise KeyError(FORMAT)
            settings, cells, upsamplers = (report[k] for k in ("settings", "cells", "upsamplers"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{path} holds no results of this benchmark; give another file"
            ) from error
        keys = settings.keys() | self.settings.keys()
        differing = sorted(k for k in keys if settings.get(k) != self.settings.get(k))
        if differing:
            said = "; ".join(
                f"{k}: {settings.get(k)} there, {self.settings.get(k)} here" for k in differing
            )
            raise UsageError(f"{path} holds results of other settings ({said}); give another file")
        self.cells, self.upsamplers = cells, upsamplers

    def find(self, dataset: str, name: str, fingerprint: str, seed: int) -> dict | None:
        """The finished cell of exactly this upsampler, or ``None``."""
        for cell in self.cells:
            if _key(cell) == (dataset, name, seed) and cell["fingerprint"] == fingerprint:
                return cell
        return None

    def add(self, cell: dict[str, Any], described: dict) -> None:
        """Keep a cell, in place of an older one of the same name, and write the file."""
        self.cells = [c for c in self.cells if _key(c) != _key(cell)] + [cell]
        self.upsamplers[cell["upsampler"]] = described
        self.write()

    def write(self) -> None:
        report = {
            "format": FORMAT,
            "machine": self.machine,
            "settings": self.settings,
            "upsamplers": self.upsamplers,
            "skipped": self.skipped,
            "cells": self.cells,
        }
        write_json(self.path, report)


def _key(cell: dict) -> tuple:
    return cell["dataset"], cell["upsampler"], cell["seed"]
