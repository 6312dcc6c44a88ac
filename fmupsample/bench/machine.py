"""What a measurement was taken on: without it, the numbers mean nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from fmupsample._version import __version__
from fmupsample.bench.memory import proc_bytes

# Facts that differ from run to run on one and the same machine.
PASSING = ("commit", "load")


def describe(device: torch.device) -> dict:
    """Processor, accelerator, versions and settings, as they go into the JSON."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": proc_bytes(Path("/proc/meminfo"), "MemTotal"),
        "gpu": _gpu(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "timm": version("timm"),
        "python": platform.python_version(),
        "fmupsample": __version__,
        "float32_matmul": torch.get_float32_matmul_precision(),
        "commit": _commit(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def same_machine(one: dict, other: dict) -> bool:
    """Whether results of two descriptions may stand in one file."""
    keys = (one.keys() | other.keys()) - set(PASSING)
    return all(one.get(key) == other.get(key) for key in keys)


def cache_bytes(device: torch.device) -> int:
    """The last-level cache of a GPU, or a guess that is large enough for those of today."""
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu(device: torch.device) -> dict:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "cache_bytes": cache_bytes(device),
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
    }


def _commit() -> str | None:
    """The commit in use, with a plus where files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not somebody else's repository
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "..")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
