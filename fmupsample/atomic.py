"""A file is there whole or not at all, whenever the run is stopped or the power fails.

A file is written under a temporary name, flushed to the disk, and renamed: no final name ever
stands for half a file. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

_PREFIX, _SUFFIX = ".fmupsample-", ".part"
_numbers = itertools.count()
_TOKEN = secrets.token_hex(4)  # of this process


def temporary_for(path: Path, extension: str = "") -> Path:
    """A name in the folder of ``path`` under which to write it first; short, hidden, unique.

    Args:
        extension: at its end, for who goes by that.
    """
    # Processes of two machines or containers may have the same number.
    own = f"{os.getpid()}-{_TOKEN}-{next(_numbers)}"
    return path.with_name(f"{_PREFIX}{own}{_SUFFIX}{extension}")


@contextlib.contextmanager
def replacing(path: Path, extension: str = "") -> Iterator[Path]:
    """``with replacing(path) as temporary``: what was written there becomes ``path`` at the end.

    After an error, or Ctrl-C, the temporary file is removed and ``path`` is what it was before.
    After a power failure it is one of the two.
    """
    temporary = temporary_for(path, extension)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until the file or folder ``path`` is on the disk.

    File systems that cannot do so, such as some of networks, are taken as they are.

    Raises:
        OSError: it could not be written.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(handle)


def remove_leftovers(folders: Iterable[Path]) -> None:
    """Delete temporary files of runs that were killed.

    Call it under the :class:`~fmupsample.runs.lock.FolderLock` of the folder.
    """
    for folder in folders:
        for leftover in folder.glob(f"{_PREFIX}*{_SUFFIX}*"):
            with contextlib.suppress(OSError):
                leftover.unlink()
