"""The JSON files: results of one machine and one set of versions, added to as they come."""

from __future__ import annotations

import json
from pathlib import Path

from fmupsample.bench.machine import same_machine


def read(path: Path | None, machine: dict) -> list[dict]:
    """The results in the file, if they are of this machine and these versions; else none."""
    if path is None or not path.exists():
        return []
    report = json.loads(path.read_text())
    if not same_machine(report.get("machine", {}), machine):
        print(f"{path} is of another machine or other versions: it will be replaced")
        return []
    return report["results"]


def key(result: dict) -> tuple:
    """What tells results apart: a newer one with the same key replaces an older one."""
    return (*result["setting"].values(), result["device"], result["backend"])


def add(results: list[dict], result: dict) -> list[dict]:
    return sorted([r for r in results if key(r) != key(result)] + [result], key=key)


def write(path: Path | None, machine: dict, results: list[dict], **more: object) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": machine, "results": results, **more}
        path.write_text(json.dumps(report, indent=1) + "\n")
