"""Compiled libraries on disk, in a folder that only its user can have written."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fmupsample.atomic import replacing
from fmupsample.ops.building.architectures import OLDEST, Capability, covers
from fmupsample.ops.building.compiling import Progress

WAITING = "waiting for another process that compiles the CUDA extension"


@dataclass(frozen=True)
class Library:
    """A compiled library; beside it lies a JSON file with all but its path.

    Attributes:
        targets: architectures it holds, as nvcc names them.
        key: of the sources, flags and PyTorch it was made from.
        torch: the version of that PyTorch.
        seconds: how long it took to compile.
        bytes: its size.
        fresh: whether it was compiled by this call.
    """

    path: Path
    targets: tuple[str, ...]
    key: str
    torch: str
    seconds: float
    bytes: int
    fresh: bool = False

    @classmethod
    def read(cls, path: Path) -> Library | None:
        """The library at ``path``, or ``None`` if it is not whole."""
        facts = read_json(path.with_suffix(".json"))
        try:
            library = cls(path, **facts | {"targets": tuple(facts["targets"])})
            return library if path.stat().st_size == library.bytes else None
        except (OSError, KeyError, TypeError):
            return None

    def refused(self, key: str, gpus: Sequence[Capability]) -> str | None:
        """Why it does not serve the PyTorch in use, sources of ``key``, and ``gpus``.

        GPUs that are too old for the kernels use plain PyTorch and need no code.
        """
        if self.torch != torch.__version__:
            return f"was compiled for PyTorch {self.torch}, this is {torch.__version__}"
        if self.key != key:
            return "was compiled from other sources, or for another CUDA"
        if not all(covers(self.targets, gpu) for gpu in gpus if gpu >= OLDEST):
            return f"holds {', '.join(self.targets)}, not for this GPU"
        return None

    def write(self, compiled: Path) -> None:
        """Copy the file ``compiled`` to the path of this library, whole or not at all."""
        with replacing(self.path) as temporary:
            shutil.copyfile(compiled, temporary)
            temporary.chmod(0o755)
        facts = {name: value for name, value in vars(self).items() if name not in ("path", "fresh")}
        write_json(self.path.with_suffix(".json"), facts)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of ours; empty where there is none, or none that can be read."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def make_private(folder: Path) -> None:
    """Make ``folder``, for this user alone.

    Raises:
        OSError: that is not possible, or others can exchange the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    if not is_private(folder):
        raise OSError("another user could exchange it, or a folder above it")


def is_private(folder: Path) -> bool:
    """Whether nobody but this user, or root, can have written into ``folder`` or exchange it.

    What is loaded from there runs. ``folder`` is a path without links.
    """
    return is_ours(folder) and all(map(_holds, folder.parents))


def is_ours(path: Path) -> bool:
    """Whether ``path`` is there, is no link, and only this user, or root, can write it."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return found.st_uid in (os.geteuid(), 0) and not found.st_mode & 0o022


def _holds(folder: Path) -> bool:
    """Whether no stranger can rename what is in ``folder``, a folder above the cache.

    A group that may write there has been trusted by the user. Whoever owns ``/`` is root, also in
    a container that shows root under another number.
    """
    found = folder.stat()
    trusted = found.st_uid in (os.geteuid(), 0, Path("/").stat().st_uid)
    return trusted and (not found.st_mode & stat.S_IWOTH or bool(found.st_mode & stat.S_ISVTX))


@contextlib.contextmanager
def locked(path: Path, progress: Progress | None) -> Iterator[bool]:
    """Hold the lock file ``path``, waiting for it; it is free when its process has ended.

    Network disks may have no locks: nobody waits there, and it yields False.
    """
    import fcntl  # which Windows lacks

    with path.open("w") as handle:
        began = time.monotonic()
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if progress:
                    progress(WAITING, time.monotonic() - began)
                time.sleep(0.1)
            except OSError:
                held = False
                break
            else:
                held = True
                break
        yield held


@contextlib.contextmanager
def work_folder(cache: Path, *, alone: bool) -> Iterator[Path]:
    """An empty folder in ``cache`` that goes at the end; where ``alone``, so do killed builds'."""
    for leftover in cache.glob(".build-*") if alone else ():
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=cache) as work:
        yield Path(work)
