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


def refuse_others_files(
    folder: Path, names: Iterable[str], *, ours: str, keys: Iterable[str], instead: str
) -> None:
    """Keep from replacing what another program, or a person, has put into ``folder``.

    Args:
        names: of the files that will be written.
        ours: one of them, JSON; ``keys``: what it holds where an earlier run wrote it.
        instead: what to do about it, for the message.

    Raises:
        UsageError: one of ``names`` is there, and ``ours`` does not say that it is ours.
    """
    there = [folder / name for name in names if (folder / name).exists()]
    if not there:
        return
    try:
        said = json.loads((folder / ours).read_bytes())
        known = isinstance(said, dict) and said.keys() >= set(keys)
    except (OSError, ValueError, RecursionError):
        known = False
    if not known:
        raise UsageError(f"{str(there[0])!r} exists and was not written by this command: {instead}")
