"""Where an interrupted run goes on: one file, replaced whole, that holds numbers only."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch

from fmupsample.atomic import replacing
from fmupsample.errors import OutputError, UsageError
from fmupsample.training.config import TrainConfig

FORMAT = "fmupsample-training/2"
NAME = "checkpoint.pt"


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
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UsageError(
            f"the checkpoint {path} is damaged ({str(error).splitlines()[0]}); begin again with "
            "--overwrite"
        ) from error
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise UsageError(
            f"{path} is not a checkpoint of this version; begin again with --overwrite"
        )
    began = TrainConfig.from_dict(json.loads(whole["config"]))
    different = config.differences(began)
    if whole["pictures"] != pictures:
        different.append("other pictures, backbone or number of processes")
    if different:
        raise UsageError(
            f"the run in {path.parent} cannot go on with {'; '.join(different)}; give what it "
            "began with, or begin again with --overwrite"
        )
    return whole["state"]
