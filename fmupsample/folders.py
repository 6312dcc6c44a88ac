"""Where fmupsample keeps files of its own. Imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$FMUPSAMPLE_CACHE``, or ``fmupsample`` below the user's cache; need not exist."""
    given = os.environ.get("FMUPSAMPLE_CACHE")
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fmupsample"
