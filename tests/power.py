"""A disk whose power can fail: what is left of a folder, at any moment of a run.

What a file system guarantees without ``fsync`` is little: names may be there or not, and the bytes
of a file may be missing or zeros. :class:`Disk` looks at a folder whenever something is flushed or
renamed, and writes down the states that a failure at that moment may leave:

* names ahead: every rename took place, of the bytes only what was flushed, the rest is missing;
* zeros: the same, with zeros in place of the bytes that are missing;
* names behind: the names that were there when their folder was last flushed.
"""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

State = dict[str, bytes]  # by path, relative to the folder


class Disk:
    """Watches ``folder`` while ``monkeypatch`` holds; ``states`` are those of all moments."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.states: list[State] = []
        self._flushed: dict[int, bytes] = {}  # by inode
        # At the last flush of a folder: of each name the inode, and what was flushed of it since.
        self._named: dict[Path, dict[str, tuple[int, bytes]]] = {}
        self._lock = threading.RLock()
        fsync = os.fsync

        def flush(handle: int) -> None:
            fsync(handle)
            with self._lock:
                self._flush(handle)
                self._look()

        monkeypatch.setattr(os, "fsync", flush)
        for name in ("replace", "rename"):
            monkeypatch.setattr(os, name, self._watched(getattr(os, name)))

    def _watched(self, move):
        def moved(*arguments, **more) -> None:
            with self._lock:
                move(*arguments, **more)
                self._look()

        return moved

    def _flush(self, handle: int) -> None:
        what, path = os.fstat(handle), Path(f"/proc/self/fd/{handle}").readlink()
        if stat.S_ISDIR(what.st_mode):
            inodes = {p.name: p.stat().st_ino for p in path.iterdir() if p.is_file()}
            self._named[path] = {n: (i, self._flushed.get(i, b"")) for n, i in inodes.items()}
        else:
            content = self._flushed[what.st_ino] = path.read_bytes()
            for name, (inode, _) in self._named.get(path.parent, {}).items():
                if inode == what.st_ino:
                    self._named[path.parent][name] = (inode, content)

    def _look(self) -> None:
        there = {}
        for path in self.folder.rglob("*"):
            try:
                if path.is_file():
                    there[path] = (path.stat().st_ino, path.read_bytes())
            except FileNotFoundError:  # gone meanwhile
                continue
        inodes = {inode for inode, _ in there.values()}
        self._flushed = {i: content for i, content in self._flushed.items() if i in inodes}
        ahead, zeros = {}, {}
        for path, (inode, content) in there.items():
            name = str(path.relative_to(self.folder))
            kept = self._flushed.get(inode, b"")
            ahead[name] = kept
            zeros[name] = kept + bytes(len(content) - len(kept))
        behind = {
            str((folder / name).relative_to(self.folder)): content
            for folder, named in self._named.items()
            for name, (_, content) in named.items()
        }
        self.states += [ahead, zeros, behind]


def put(state: State, folder: Path) -> None:
    """Make ``folder`` what a failure left."""
    for name, content in state.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
