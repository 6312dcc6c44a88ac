"""Where cached tensors are kept: in memory, in a folder, or in memory as long as they fit."""

from __future__ import annotations

import contextlib
import os
import shutil
from glob import escape
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fmupsample.atomic import replacing
from fmupsample.errors import OutputError, UsageError


class Store:
    """Keeps tensors by key.

    In a folder each is a safetensors file, mapped into memory when read, which is there whole or
    not at all. The folder may be shared by runs, and deleted at any time between them. It grows up
    to ``limit`` bytes: then what has not been used for longest goes, and what this object has read
    or written stays.

    Args:
        memory: the most bytes in memory; 0: none, everything goes to ``folder``.
        folder: for what does not fit into memory; ``None``: that is refused. A set of tensors goes
            to one of the two as a whole, see :meth:`room_for`.
        limit: the most bytes in ``folder``; ``None``: what the disk has.
    """

    def __init__(
        self, memory: int = 4 << 30, folder: str | Path | None = None, limit: int | None = None
    ) -> None:
        self.memory, self.limit, self.used = memory, limit, 0
        self.folder = None if folder is None else Path(folder)
        self._kept: dict[str, Tensor] = {}
        self._touched: set[str] = set()  # keys of files
        self._to_disk = memory == 0 and folder is not None

    def get(self, key: str) -> Tensor | None:
        """What was put under ``key``, or ``None``."""
        if key in self._kept or self.folder is None:
            return self._kept.get(key)
        path = self.folder / f"{key}.safetensors"
        try:
            tensor = load_file(path)["tensor"]
        except (OSError, SafetensorError, KeyError):
            return None  # missing, or damaged: it is made again
        if key not in self._touched:
            self._touched.add(key)
            with contextlib.suppress(OSError):
                os.utime(path)
        return tensor

    def put(self, key: str, tensor: Tensor) -> None:
        """Keep ``tensor`` (on the CPU).

        Raises:
            UsageError: there is no room in memory.
            OutputError: the folder cannot be written.
        """
        if not self._to_disk:
            if key not in self._kept:
                self._check_memory(tensor.nbytes)
                self._kept[key] = tensor
                self.used += tensor.nbytes
            return
        assert self.folder is not None
        self._touched.add(key)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.folder / f"{key}.safetensors") as temporary:
                temporary.write_bytes(save({"tensor": tensor.contiguous()}))
        except OSError as error:
            raise OutputError(f"the cache {self.folder} cannot be written: {error}") from error

    def room_for(self, size: int) -> None:
        """Decide where the next ``size`` bytes go, and make room for them.

        Raises:
            UsageError: they are more than the limits allow.
            OutputError: they are more than the disk has.
        """
        self._to_disk = self.folder is not None and self.used + size > self.memory
        if self._to_disk:
            self._make_room(self.folder, size)
        else:
            self._check_memory(size)

    def forget(self, prefix: str) -> None:
        """Drop everything whose key begins with ``prefix``."""
        for key in [key for key in self._kept if key.startswith(prefix)]:
            self.used -= self._kept.pop(key).nbytes
        if self.folder is not None:
            for path in self.folder.glob(f"{escape(prefix)}*.safetensors"):
                path.unlink(missing_ok=True)

    def _check_memory(self, size: int) -> None:
        if self.used + size > self.memory:
            raise UsageError(
                f"features and kernel weights need {(self.used + size) / 1e9:.3g} GB of memory, "
                f"more than the limit of {self.memory / 1e9:.3g} GB: keep them on disk (give a "
                "cache folder), show the pictures smaller, or take fewer"
            )

    def _make_room(self, folder: Path, size: int) -> None:
        kept, others = 0, []
        for path in folder.glob("*.safetensors"):
            with contextlib.suppress(OSError):
                stat = path.stat()
                if path.stem in self._touched:
                    kept += stat.st_size
                else:
                    others.append((stat.st_mtime, stat.st_size, path))
        if self.limit is not None:
            if kept + size > self.limit:
                raise UsageError(
                    f"features and kernel weights need {(kept + size) / 1e9:.3g} GB on disk, more "
                    f"than the limit of {self.limit / 1e9:.3g} GB: raise --cache-limit, show the "
                    "pictures smaller, or take fewer"
                )
            there = sum(own for _, own, _ in others)
            for _, own, path in sorted(others):
                if kept + there + size <= self.limit:
                    break
                path.unlink(missing_ok=True)
                there -= own
        existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(existing).free
        if size > free:
            raise OutputError(
                f"features and kernel weights need {size / 1e9:.3g} GB, but {folder} has "
                f"{free / 1e9:.3g} GB free: show the pictures smaller, or take fewer"
            )
