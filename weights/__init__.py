"""The weights shipped with fmupsample: safetensors files, a card beside each.

``embedded.safetensors`` is the default backbone; the other files are trained heads. Only the
standard library is used here, so that looking at what is shipped costs nothing.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

# The package is always installed unpacked (torch reads the files by path).
FOLDER = Path(str(files(__name__)))


def list_weights() -> list[Path]:
    """Every shipped safetensors file, sorted by name."""
    return sorted(FOLDER.glob("*.safetensors"))


def find_weights(name: str) -> Path | None:
    """The shipped file ``name`` (with or without ``.safetensors``), or ``None``."""
    path = FOLDER / (name if name.endswith(".safetensors") else f"{name}.safetensors")
    return path if path.is_file() else None


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file's header; ``{}`` if there is none or it is damaged."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length < 100_000_000:
                return {}
            header = json.loads(file.read(length))
    except (OSError, ValueError):
        return {}
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    return {str(key): str(value) for key, value in metadata.items()}
