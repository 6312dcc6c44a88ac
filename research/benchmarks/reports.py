"""The JSON files: results of one machine and one set of versions, added to as they come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from common import write_json
from fmupsample.bench.machine import describe, same_machine
from fmupsample.ops import backend


class Report:
    """Results in ``path`` (``None``: nowhere); those of another machine are replaced."""

    def __init__(self, path: Path | None, device: torch.device) -> None:
        self.path, self.device, self.machine = path, device, describe(device)
        self.results: list[dict[str, Any]] = []
        if path is not None and path.exists():
            known = json.loads(path.read_text())
            if same_machine(known.get("machine", {}), self.machine):
                self.results = known["results"]
            else:
                print(f"{path} is of another machine or other versions: it will be replaced")

    def add(self, setting: dict[str, Any], **found: Any) -> dict[str, Any]:
        """Keep a result, in place of an older one of this setting, device and backend."""
        result = self.result(setting, **found)
        others = [r for r in self.results if key(r) != key(result)]
        self.results = sorted([*others, result], key=key)
        return result

    def result(self, setting: dict[str, Any], **found: Any) -> dict[str, Any]:
        used = {"device": self.device.type, "backend": backend.prepare(self.device).name}
        return {"setting": setting, **used, **found}

    def write(self, **more: Any) -> None:
        content = {"machine": self.machine, "results": self.results, **more}
        write_json(self.path, content)


def key(result: dict[str, Any]) -> tuple:
    """What tells results apart."""
    return (*result["setting"].values(), result["device"], result["backend"])
