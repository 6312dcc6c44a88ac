"""From a name or a file to an upsampler, and where heads are looked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fmupsample.errors import HeadError, UsageError
from fmupsample.folders import cache_folder
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.heads import (
    ANY,
    BackboneLike,
    load_head,
    read_head_metadata,
    same_backbone,
)
from fmupsample.upsamplers.hub import PREFIX, head_file
from fmupsample.upsamplers.official.checkpoints import (
    fetched,
    is_checkpoint,
    load_checkpoint,
    published,
)
from fmupsample.upsamplers.registry import (
    METHODS,
    Needs,
    any_backbone_names,
    current_name,
    require_in_library,
    similar,
    upsampler_names,
)


def load_upsampler(backbone: BackboneLike, source: str | Path | None = None) -> Upsampler:
    """The upsampler to use with a backbone, in evaluation mode on the CPU.

    Args:
        source: ``None`` for the shipped or cached head of this backbone, or where there is none
            the one that serves all; a method's name (of one with parameters: its head, or its
            published checkpoint, which is downloaded at first use); or a head file, a checkpoint of
            the authors', a folder of :func:`.save_pretrained`, or ``"hf:owner/name"`` of the hub.

    Raises:
        HeadError: the head does not exist, is damaged, or belongs to another backbone.
        UsageError: neither a method's name nor an existing file.
    """
    source = current_name(source) if isinstance(source, str) else source
    named = METHODS.get(source) if isinstance(source, str) else None
    if named is not None and named.needs == Needs.NOTHING:
        method = named.build({})
        method.fingerprint = named.name
        return method.eval()
    if source is None or (named is not None and named.learned):
        # One that serves all is found by its name alone.
        names = (None, *any_backbone_names()) if named is None else (named.name,)
        found = next(filter(None, (find_head(backbone, name) for name in names)), None)
        checkpoint = None if named is None else published(named.name, backbone.name)
        if found is None and checkpoint is not None:
            return _from_checkpoint(fetched(checkpoint), backbone)
        if found is None:
            raise HeadError(
                f"there is no head for {backbone.name} (layer {backbone.layer}): use "
                f"--upsampler {any_backbone_names()[0]} (serves any backbone) or jbu (needs no "
                "training), give a head file with --head, or train one with `fmupsample train`"
            )
        return load_head(found, backbone)
    if str(source).startswith(PREFIX):
        return load_head(head_file(source), backbone)
    path = head_file(source)
    if is_checkpoint(path):
        return _from_checkpoint(path, backbone)
    if isinstance(source, str) and not path.exists() and path.suffix != ".safetensors":
        require_in_library(source)
        known = upsampler_names()
        raise UsageError(
            f"{source!r} is neither an upsampler ({', '.join(known)}) nor a head file"
            f"{similar(source, known)}"
        )
    return load_head(path, backbone)


def upsampler_named(
    name: str,
    backbone: BackboneLike | None = None,
    *,
    pretrained: bool = True,
    channels: int | None = None,
    **options: Any,
) -> Upsampler:
    """A method with or without trained parameters, in evaluation mode: for ``torch.hub``.

    Args:
        backbone: whose head it is. Without one, a head for any backbone, which takes images
            normalised with ImageNet's mean and standard deviation.
        pretrained: ``False``: parameters as they are before training.
        channels: of the features; default: the backbone's.
        options: fields of the method's configuration, without training.

    Raises:
        HeadError: there is no such head.
        UsageError: no such method; one whose heads are for one backbone, without the backbone;
            options for what is trained already.
    """
    method = METHODS.get(name := current_name(name))
    if method is None:
        raise UsageError(f"{name!r} is no upsampler: there are {', '.join(upsampler_names())}")
    if method.needs == Needs.NOTHING:
        return method.build(options).eval()
    if channels is None:
        channels = getattr(backbone, "channels", None)
    if channels is None and method.needs == Needs.OWN_HEAD:
        raise UsageError(f"{name} is for one backbone: give the backbone, or its channels")
    if not pretrained:
        head = method.build(method.options(channels or 0, options)).eval()
        if backbone is not None:
            head.use_with(backbone.mean, backbone.std)
        return head
    if options:
        raise UsageError(f"{', '.join(options)}: with pretrained=False only")
    if backbone is not None:
        return load_upsampler(backbone, name)
    for path, metadata in list_heads():
        if (metadata["upsampler"], metadata["backbone"].get("name")) == (name, ANY):
            return load_head(path)
    checkpoint = published(name)
    if checkpoint is None:
        raise HeadError(f"there is no head of {name} that serves any backbone: give the backbone")
    return load_checkpoint(fetched(checkpoint))


def _from_checkpoint(path: Path, backbone: BackboneLike) -> Upsampler:
    head = load_checkpoint(path)
    channels = head.config.channels
    if channels not in (0, backbone.channels):
        raise HeadError(
            f"{path} is for features of {channels} channels, those of {backbone.name} have "
            f"{backbone.channels}"
        )
    head.use_with(backbone.mean, backbone.std)
    return head


def head_folders() -> list[Path]:
    """Where heads are looked for, in this order: the user's cache, then what is shipped."""
    import fmupsample_weights

    return [cache_folder() / "heads", fmupsample_weights.FOLDER]


def list_heads() -> list[tuple[Path, dict]]:
    """Every head that can be found without a network, with its decoded header."""
    heads = []
    for folder in head_folders():
        for path in sorted(folder.glob("*.safetensors")):
            try:
                heads.append((path, read_head_metadata(path)))
            except HeadError:
                continue  # a backbone's file, or damaged: not a head to offer
    return heads


def find_head(backbone: BackboneLike, upsampler: str | None = None) -> Path | None:
    """The first head made for this backbone and layer (and of this method), or ``None``.

    One that serves all is found only by its method's name, after those of the backbone's own; of
    these, one that was trained with as many views comes first.
    """
    found = for_all = None
    for path, metadata in list_heads():
        made_for = metadata["backbone"]
        if upsampler not in (None, metadata["upsampler"]):
            continue
        if made_for.get("name") == ANY:
            for_all = for_all or (path if upsampler is not None else None)
            continue
        if same_backbone(made_for, backbone) and made_for.get("layer") == backbone.layer:
            if made_for.get("views", 1) == getattr(backbone, "views", 1):
                return path
            found = found or path
    return found or for_all
