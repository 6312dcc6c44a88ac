"""What is in huggingface_hub's cache on this disk. Imports neither torch nor timm."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

SAFE_FIRST = ("model.safetensors", "pytorch_model.bin")


def hub_cache() -> Path:
    """Where huggingface_hub keeps downloads (set by HF_HOME or HF_HUB_CACHE)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def find_in_cache(
    repository: str, filenames: Iterable[str] = SAFE_FIRST, revision: str | None = None
) -> Path | None:
    """The first of ``filenames`` of ``repository`` that has been downloaded, or ``None``."""
    from huggingface_hub import try_to_load_from_cache

    for filename in filenames:
        path = try_to_load_from_cache(repository, filename, revision=revision)
        if isinstance(path, str) and Path(path).is_file():
            return Path(path)
    return None


def cached_timm_repositories() -> list[str]:
    """Names of the repositories of timm's organisation that have a folder in the cache."""
    prefix = "models--timm--"
    return sorted(folder.name.removeprefix(prefix) for folder in hub_cache().glob(f"{prefix}*"))
