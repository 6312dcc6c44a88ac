"""Heads in repositories of the Hugging Face hub, and in folders that look like one.

A repository holds ``model.safetensors`` (a head file, which alone is read), ``config.json`` (its
header, for people and search) and ``README.md`` (a model card made from it).
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmupsample.atomic import replacing
from fmupsample.errors import HeadError, OutputError, UsageError
from fmupsample.network import endpoint, offline, quiet_client, unreachable
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.heads import (
    ANY,
    BackboneLike,
    load_head,
    loadable_name,
    read_head_metadata,
    save_head,
)

PREFIX = "hf:"
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_PART = r"\w([\w.-]*\w)?"
_NAME = re.compile(rf"(?P<repository>{_PART}/{_PART})(@(?P<revision>{_PART}(/{_PART})*))?")


def save_pretrained(
    head: Upsampler | str | Path,
    folder: str | Path,
    backbone: BackboneLike | None = None,
    card: Mapping[str, Any] | None = None,
) -> Path:
    """Write a head as a folder that can be a repository of the hub.

    Args:
        head: an upsampler, or a head file, which keeps its own backbone and card.
        folder: made if it is not there; files of the three names in it are replaced.
        backbone, card: of an upsampler, as of :func:`.save_head`.

    Returns:
        The folder.

    Raises:
        HeadError: not a head file.
        OutputError: the folder cannot be written.
        UsageError: a backbone or card for a head file.
    """
    folder = Path(folder)
    weights = folder / WEIGHTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(head, Upsampler):
            save_head(weights, head, backbone, card)
        elif backbone is not None or card is not None:
            raise UsageError("a head file has a backbone and a card of its own: give it alone")
        else:
            read_head_metadata(head)
            with replacing(weights) as temporary:
                shutil.copyfile(head, temporary)
        header = read_head_metadata(weights)
        _write(folder / CONFIG, json.dumps(_without_history(header), indent=2) + "\n")
        _write(folder / CARD, model_card(header))
    except OSError as error:
        raise OutputError(f"the head cannot be written to {folder}: {error}") from error
    return folder


def from_pretrained(
    where: str | Path,
    backbone: BackboneLike | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
) -> Upsampler:
    """Load a head from the hub (``"owner/name"``), or from a folder of :func:`save_pretrained`.

    What was downloaded before is used as it is, without a network; ``revision`` names another
    version.

    Args:
        backbone: that the head is checked against; ``None`` skips the check.

    Raises:
        HeadError: not to be had, damaged, or made for another backbone.
        UsageError: neither a folder nor the name of a repository.
    """
    if Path(where).is_dir():
        return load_head(Path(where) / WEIGHTS, backbone)
    name = str(where).removeprefix(PREFIX) + (f"@{revision}" if revision else "")
    return load_head(head_file(PREFIX + name, token=token), backbone)


def push_to_hub(
    head: Upsampler | str | Path,
    repository: str,
    backbone: BackboneLike | None = None,
    *,
    card: Mapping[str, Any] | None = None,
    private: bool = False,
    token: str | None = None,
    message: str = "Upload a head of fmupsample",
) -> str:
    """Upload a head to ``owner/name`` on the hub; the repository is made if it is not there.

    Args:
        head, backbone, card: as of :func:`save_pretrained`.
        token: default: the one of ``hf auth login``.

    Returns:
        The address of the repository.

    Raises:
        HeadError: the hub cannot be reached, or refuses.
        UsageError: not the name of a repository.
    """
    from huggingface_hub import HfApi

    repository, _ = _parsed(repository)
    reason = offline() or unreachable(endpoint())
    if reason:
        raise HeadError(f"the head cannot be uploaded to {repository}: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(head, folder, backbone, card)
        api = HfApi(token=token)
        try:
            with quiet_client():
                api.create_repo(repository, private=private, exist_ok=True)
                api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
        # The client raises its own, its HTTP library's and OS errors.
        except Exception as error:
            raise HeadError(
                _explain("the head cannot be uploaded to", repository, error)
            ) from error
    return f"{endpoint()}/{repository}"


def head_file(source: str | Path, *, token: str | None = None) -> Path:
    """The head file that ``source`` means: ``hf:owner/name[@revision]``, a folder, or a file.

    Raises:
        HeadError: not cached, and not to be downloaded; in one sentence, within seconds.
        UsageError: not the name of a repository.
    """
    if not str(source).startswith(PREFIX):
        return Path(source) / WEIGHTS if Path(source).is_dir() else Path(source)
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    repository, revision = _parsed(str(source))
    cached = try_to_load_from_cache(repository, WEIGHTS, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    reason = offline() or unreachable(endpoint())
    if reason:
        raise HeadError(
            f"the head {PREFIX}{repository} is not on this machine and {reason}: download "
            f"{WEIGHTS} of {endpoint()}/{repository} elsewhere, and give that file"
        )
    try:
        with quiet_client():
            options = {"revision": revision, "token": token, "etag_timeout": 5}
            return Path(hf_hub_download(repository, WEIGHTS, **options))
    # The client raises its own, its HTTP library's and OS errors: sort them by what they say.
    except Exception as error:
        raise HeadError(_explain("there is no head to be had from", repository, error)) from error


def model_card(header: Mapping[str, Any]) -> str:
    """A README for the hub, from the decoded header of a head file."""
    backbone, name = header["backbone"], header["upsampler"]
    for_all = backbone.get("name") == ANY
    front = {"library_name": "fmupsample", "tags": ["feature-upsampling", name]}
    # Text in JSON is text in YAML, and cannot end the front matter.
    front_matter = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    of = "any backbone" if for_all else f"{backbone.get('name')}, layer {backbone.get('layer')}"
    loadable = loadable_name(str(backbone.get("name")))
    arguments = "" if for_all else f'"{loadable}", layer={backbone.get("layer")!r}'
    rows = [(key, json.dumps(value)) for key, value in header["card"].items()]
    rows = rows or [("recipe", "not recorded")]
    table = "\n".join(f"| {key} | {value.replace('|', chr(92) + '|')} |" for key, value in rows)
    return f"""---
{front_matter}
---
# {name} for {of}

Upsamples the features of {of} to every pixel of the image, with the Python package `fmupsample`.

```python
backbone = fmupsample.load_backbone({arguments})
up = fmupsample.load_upsampler(backbone, "{PREFIX}OWNER/NAME")  # this repository
images = backbone.prepare("cat.jpg")
features = up(backbone(images), images)  # [B, C, H, W]
```

| | |
|---|---|
{table}

Configuration: `{json.dumps(header["config"])}`
"""


def _without_history(header: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in header.items() if key != "stored_as"}


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _parsed(source: str) -> tuple[str, str | None]:
    """Repository and revision."""
    match = _NAME.fullmatch(source.removeprefix(PREFIX).lstrip("/"))
    if match is None:
        raise UsageError(f"{source!r} is no repository of the hub: give {PREFIX}owner/name")
    return match["repository"], match["revision"]


def _explain(what: str, repository: str, error: Exception) -> str:
    kind = type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    address = f"{endpoint()}/{repository}"
    if kind == "GatedRepoError" or status in (401, 403):
        reason = "it is private, gated or not there: log in with `hf auth login`"
    elif kind in ("RepositoryNotFoundError", "RevisionNotFoundError") or status == 404:
        reason = f"it has no {WEIGHTS}, or is not there"
    else:
        said = str(error).strip().splitlines()
        reason = said[0][:160].rstrip(". ") if said else kind
    return f"{what} {address}: {reason}"
