"""Where an interrupted run goes on: one file, replaced whole, that holds numbers only."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from fmupsample.atomic import replacing
from fmupsample.errors import OutputError, UsageError
from fmupsample.images.find import printable
from fmupsample.training.config import TrainConfig

FORMAT = "fmupsample-training/4"  # from 4 on, without the options of terms that went
NAME = "checkpoint.pt"


_ENDS = 1 << 16  # bytes


def content_mark(path: Path) -> str:
    """A digest of the size, the first and the last 64 kB of a file: another one, another content.

    That is where the header and the checksum of a compressed picture lie; the whole of every
    picture would take minutes to read. An empty text where the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _ENDS))
            end = file.read(_ENDS)
            file.seek(0)
            return hashlib.sha256(b"%d:" % size + file.read(_ENDS) + end).hexdigest()[:16]
    except OSError:
        return ""


def save_checkpoint(path: Path, config: TrainConfig, pictures: str, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, and containers of them).

    Raises:
        OutputError: it cannot be written.
    """
    whole = {
        "format": FORMAT,
        "config": json.dumps(config.to_dict()),
        "pictures": pictures,
        "state": state,
    }
    buffer = io.BytesIO()
    torch.save(whole, buffer)
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(buffer.getvalue())
    except OSError as error:
        raise OutputError(
            f"the checkpoint {path} cannot be written: {error.strerror or error}"
        ) from error


def load_checkpoint(path: Path, config: TrainConfig, pictures: str) -> dict[str, Any]:
    """The state in ``path``, if it belongs to this run.

    Raises:
        UsageError: no such file, damaged, or of a run with other options or pictures.
    """
    if not path.is_file():
        raise UsageError(
            f"there is nothing to go on from: {path} does not exist; leave --resume away to begin"
        )
    try:
        whole = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged archive or pickle raises any of these, depending on where it breaks off. What torch
    # says of it is not repeated: it advises to load the file without protection.
    except (
        OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
        pickle.UnpicklingError,
    ) as error:  # fmt: skip
        raise UsageError(damaged(path)) from error
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise UsageError(
            f"{path} is not a checkpoint of this version; begin again with --overwrite"
        )
    try:
        began, seen, state = json.loads(whole["config"]), whole["pictures"], dict(whole["state"])
        different = config.differences(TrainConfig.from_dict(began))
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UsageError(damaged(path)) from error
    if seen != pictures:
        different.append("other pictures, backbone or number of processes")
    if different:
        raise UsageError(
            f"the run in {path.parent} cannot go on with {'; '.join(different)}; give what it "
            "began with, or begin again with --overwrite"
        )
    return state


def damaged(path: Path) -> str:
    """What is said of a checkpoint that cannot be taken up."""
    return f"the checkpoint {printable(path)} is damaged; begin again with --overwrite"
