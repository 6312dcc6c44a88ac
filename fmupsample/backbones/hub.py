"""Pretrained weights of timm models: in the local caches, or downloaded once.

Whatever the hub and the network do, the answer comes within seconds: the caches are looked at
first, then a connection is tried with a short limit, and only then is anything downloaded.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from urllib.parse import urlparse

from timm.models import get_pretrained_cfg

from fmupsample.backbones.aliases import ALIASES
from fmupsample.backbones.cache import SAFE_FIRST, cached_timm_repositories, find_in_cache
from fmupsample.backbones.names import Resolved
from fmupsample.errors import BackboneError
from fmupsample.network import endpoint, offline, quiet_client, unreachable


def cached_file(full_name: str) -> Path | None:
    """The weights file of ``architecture.tag`` on this disk, or ``None``; uses no network."""
    cfg = get_pretrained_cfg(full_name)
    if cfg is None:
        return None
    if cfg.hf_hub_id:
        repository, revision = _split(cfg.hf_hub_id)
        path = find_in_cache(repository, _filenames(cfg), revision)
        if path is not None:
            return path
    if cfg.url:
        path = _torch_cache() / _url_filename(cfg.url)
        if path.is_file():
            return path
    return None


def cached_names() -> list[str]:
    """Full timm names whose weights are cached, sorted."""
    names = {alias.tag for alias in ALIASES.values()}
    names.update(cached_timm_repositories())
    cached = set()
    for name in names:
        with contextlib.suppress(RuntimeError):  # a name that this timm does not know
            if cached_file(name):
                cached.add(name)
    return sorted(cached)


def fetch(wanted: Resolved) -> Path:
    """The weights file of ``wanted``: the cached one, else downloaded into the hub cache.

    Raises:
        BackboneError: not cached and not to be had; one sentence with what was tried and the
            ways on.
    """
    path = cached_file(wanted.full)
    if path is not None:
        return path
    cfg = get_pretrained_cfg(wanted.full)
    reason = offline() or unreachable(endpoint() if cfg.hf_hub_id else str(cfg.url))
    if reason:
        raise BackboneError(_not_here(wanted, reason))
    try:
        return _download_hub(cfg) if cfg.hf_hub_id else _download_url(cfg)
    # The hub client raises its own, its HTTP library's and OS errors: sort them by what they say.
    except Exception as error:
        raise BackboneError(_explain(wanted, cfg, error)) from error


def _download_hub(cfg) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError

    repo, revision = _split(cfg.hf_hub_id)
    missing: Exception | None = None
    for filename in _filenames(cfg):
        try:
            with quiet_client():
                return Path(hf_hub_download(repo, filename, revision=revision, etag_timeout=5))
        except EntryNotFoundError as error:
            # Also raised when the connection breaks; then the other names are no better.
            if isinstance(error, FileNotFoundError):
                raise
            missing = error
    raise missing or FileNotFoundError(repo)


def _download_url(cfg) -> Path:
    import torch

    target = _torch_cache() / _url_filename(cfg.url)
    target.parent.mkdir(parents=True, exist_ok=True)
    address = cfg.url if isinstance(cfg.url, str) else cfg.url[0]
    torch.hub.download_url_to_file(address, str(target))
    return target


def _filenames(cfg) -> list[str]:
    """Names the weights may have in their repository, safe formats first."""
    if not cfg.hf_hub_filename:
        return list(SAFE_FIRST)
    name = cfg.hf_hub_filename
    if not name.endswith(".bin"):
        return [name]
    return [
        name.replace("pytorch_model.bin", "model.safetensors"),
        f"{name.removesuffix('.bin')}.safetensors",
        name,
    ]


def _split(hub_id: str) -> tuple[str, str | None]:
    repo, _, revision = hub_id.partition("@")
    return repo, revision or None


def _url_filename(url: str | tuple[str, str]) -> str:
    return Path(urlparse(url).path).name if isinstance(url, str) else url[1]


def _torch_cache() -> Path:
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints"


def ways_on(asked: str) -> str:
    """The three ways on when weights cannot be had, as the end of a sentence."""
    names = cached_names()
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    cached = f"a model that is cached ({shown})" if names else "a cached model (none is yet)"
    return (
        f"use the shipped model (--backbone embedded), a local file (--backbone {asked} "
        f"--backbone-weights FILE), or {cached}"
    )


def _not_here(wanted: Resolved, reason: str) -> str:
    also = f" ({wanted.full})" if wanted.asked != wanted.full else ""
    return f"{wanted.asked}{also} is not on this machine and {reason}; {ways_on(wanted.asked)}"


def _explain(wanted: Resolved, cfg, error: Exception) -> str:
    kind = type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if kind == "GatedRepoError" or status in (401, 403):
        return (
            f"{wanted.asked} needs its licence accepted: open {endpoint()}/{cfg.hf_hub_id}, "
            f"accept it, and log in with `hf auth login`; or {ways_on(wanted.asked)}"
        )
    if status == 404 or kind in ("RepositoryNotFoundError", "RemoteEntryNotFoundError"):
        return f"{endpoint()} has no weights {cfg.hf_hub_id or cfg.url}; {ways_on(wanted.asked)}"
    if kind == "LocalEntryNotFoundError":
        return _not_here(wanted, "the connection to the hub broke off")
    first = str(error).strip().splitlines()[0] if str(error).strip() else kind
    return _not_here(wanted, f"the download failed ({first[:160].rstrip('. ')})")
