"""Two runs do not write into one output folder at the same time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from fmupsample.errors import OutputError
from fmupsample.images.find import printable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_LOCK = ".fmupsample.lock"


class FolderLock:
    """``with FolderLock(folder)``: two runs do not write into the same folder at the same time.

    The lock belongs to the process: it is gone when the process is, however that ends. On systems
    and network disks without locks, runs are not protected from each other.

    Args:
        wait: wait for the other run to end, and be told so, instead of giving up.

    Raises:
        OutputError: the folder cannot be made or written, or another run holds the lock.
    """

    def __init__(self, folder: Path, *, wait: Callable[[], None] | None = None) -> None:
        self.folder, self.wait = folder, wait
        self._created: list[Path] = []
        self._handle: int | None = None

    def __enter__(self) -> FolderLock:
        shown = printable(self.folder)
        missing = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Who waits is the last: the run before could not remove what is still in use.
            self._created = missing or [self.folder] * (self.wait is not None)
            self._lock()
        except FileExistsError as error:
            raise OutputError(f"{shown} is a file; the output must be a folder") from error
        except BlockingIOError as error:
            raise OutputError(f"another run is writing into {shown}; wait for it") from error
        except OSError as error:
            raise OutputError(
                f"cannot write into the output folder {shown}: {error.strerror}"
            ) from error
        return self

    def _lock(self) -> None:
        path = self.folder / _LOCK
        while True:
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:
                if self.wait is None:
                    raise
                # The run that was waited for has removed the folder.
                self.folder.mkdir(parents=True, exist_ok=True)
                continue
            try:
                if fcntl is not None:
                    self._take(handle)
                # Between open and lock, a run that ended may have removed the file.
                current = path.exists() and os.path.samestat(path.stat(), os.fstat(handle))
            except BlockingIOError:
                os.close(handle)
                raise
            except OSError:
                current = True  # a disk without locks
            if current:
                self._handle = handle
                return
            os.close(handle)

    def _take(self, handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if self.wait is None:
                raise
            self.wait()
            fcntl.flock(handle, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            (self.folder / _LOCK).unlink()
        if self._handle is not None:
            os.close(self._handle)
        # A run that ended before its first result leaves no empty folder behind.
        for folder in self._created:
            with contextlib.suppress(OSError):
                folder.rmdir()
