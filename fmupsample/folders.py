"""Folders of our own, and of users. Imports nothing heavy."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from fmupsample.errors import UsageError


def cache_folder() -> Path:
    """``$FMUPSAMPLE_CACHE``, or ``fmupsample`` below the user's cache; need not exist."""
    given = os.environ.get("FMUPSAMPLE_CACHE")
    if given:
        return Path(given).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # which the XDG specification asks to ignore
        try:
            base = Path.home() / ".cache"
        except RuntimeError:  # no HOME, and a user who is in no list
            base = Path(tempfile.gettempdir()) / f"fmupsample-cache-{os.getuid()}"
    return base / "fmupsample"


def refuse_others_files(folder: Path, names: Iterable[str], *, ours: bool, instead: str) -> None:
    """Keep from replacing what another program, or a person, has put into ``folder``.

    Args:
        names: of the files that will be written.
        ours: whether an earlier run of ours has written into the folder.
        instead: what to do about it, for the message.

    Raises:
        UsageError: one of ``names`` is there, and not ours.
    """
    there = [folder / name for name in names if (folder / name).exists()]
    if there and not ours:
        raise UsageError(f"{str(there[0])!r} exists and was not written by this command: {instead}")


def holds_keys(path: Path, *keys: str) -> bool:
    """Whether ``path`` is JSON with these keys, as an earlier run wrote it."""
    try:
        said = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(said, dict) and said.keys() >= set(keys)
