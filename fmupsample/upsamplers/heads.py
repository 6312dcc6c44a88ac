"""Head files: a trained upsampler and what it was trained for, in one safetensors file.

The header (safetensors metadata, all values strings) holds ``format``, ``upsampler``, ``config``
(JSON of the module's configuration), ``backbone`` (JSON: name, layer, channels, stride, mean, std,
fingerprint, and views where there are several; of a head for any backbone only the name, "any"),
and ``card`` (JSON: data, recipe, seed, hardware, metrics).

A head serves its backbone in any number of views, whatever it was trained with: the features are
of the same kind, and the ratio comes from the sizes.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fmupsample.atomic import replacing
from fmupsample.errors import HeadError, OutputError, RenamedWarning, UsageError
from fmupsample.fingerprint import fingerprint
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.earlier import in_todays_words
from fmupsample.upsamplers.registry import METHODS, Method, require_in_library, resolve

FORMAT = "fmupsample-head/1"
# Other files of this package that are given for a head, by the beginning of their format.
_OTHER_FILES = {
    "fmupsample-probe": "a probe, not a head: it goes to `fmupsample probe eval` and `predict`",
    "fmupsample-backbone": "a backbone, not a head: it goes to --backbone-weights",
    "fmupsample-compact": "a file of features, not a head: fmupsample.open reads it",
}
ANY = "any"  # in the place of a backbone's name: a head for all of them
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class BackboneLike(Protocol):
    """What a head needs to know of a backbone."""

    name: str
    layer: int | str
    channels: int
    stride: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str


def describe_backbone(backbone: BackboneLike) -> dict[str, Any]:
    """The facts about a backbone that a head file records.

    They are those of a single view, and ``views`` where there are several.
    """
    views = getattr(backbone, "views", 1)
    if views != 1:
        return {**describe_backbone(backbone.single), "views": views}
    return {
        "name": backbone.name,
        "layer": backbone.layer,
        "channels": backbone.channels,
        "stride": list(backbone.stride),
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "fingerprint": backbone.fingerprint,
    }


def save_head(
    path: str | Path,
    head: Upsampler,
    backbone: BackboneLike | None = None,
    card: Mapping[str, Any] | None = None,
) -> None:
    """Write a head file; it appears under its name only when complete.

    Args:
        head: any upsampler of this package, with parameters or without.
        backbone: ``None``: the head serves any.

    Raises:
        OutputError: the file cannot be written.
        UsageError: an upsampler that :func:`load_head` does not know.
    """
    path = Path(path)
    if head.name not in METHODS or not isinstance(head, resolve(METHODS[head.name].kind)):
        raise UsageError(
            f"{type(head).__name__} is no upsampler that a head file can hold: save its "
            "state_dict(), or for a stage of a stack the stack"
        )
    metadata = {
        "format": FORMAT,
        "upsampler": head.name,
        "config": json.dumps(head.options()),
        "backbone": json.dumps({"name": ANY} if backbone is None else describe_backbone(backbone)),
        "card": json.dumps(dict(card or {})),
    }
    state = {k: v.detach().cpu().contiguous() for k, v in head.state_dict().items()}
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(save(state, metadata))
    except OSError as error:
        raise OutputError(f"the head could not be written to {path}: {error}") from error


def read_head_metadata(path: str | Path) -> dict[str, Any]:
    """The decoded header of a head file, in today's names; ``stored_as`` is the method's there.

    Raises:
        HeadError: no such file, not safetensors, or not a head.
    """
    path = Path(path)
    if not path.is_file():
        raise HeadError(f"there is no head file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            raw = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise HeadError(
            f"{path} is not a readable safetensors file ({error}); heads are .safetensors files "
            "written by fmupsample"
        ) from error
    other = _OTHER_FILES.get(str(raw.get("format")).partition("/")[0])
    if other is not None:
        raise HeadError(f"{path} is {other}")
    if raw.get("format") != FORMAT:
        raise HeadError(
            f"{path} is not a head file of this version: its format is "
            f"{raw.get('format', 'not stated')!r}, expected {FORMAT!r}"
        )
    try:
        decoded = {k: json.loads(raw[k]) for k in ("config", "backbone", "card")}
        if not all(isinstance(value, dict) for value in decoded.values()):
            raise ValueError("config, backbone and card must be mappings")
        stored = raw.get("upsampler", "")
        name, decoded["config"] = in_todays_words(stored, decoded["config"])
    except HeadError as error:
        raise HeadError(f"the head file {path} cannot be used: {error}") from error
    except (KeyError, ValueError, RecursionError) as error:
        raise HeadError(f"the header of the head file {path} is damaged: {error}") from error
    return {"upsampler": name, "stored_as": stored, **decoded}


def load_head(path: str | Path, backbone: BackboneLike | None = None) -> Upsampler:
    """Load a head file and check it against the backbone in use.

    Args:
        backbone: ``None`` skips the check.

    Raises:
        HeadError: unreadable, damaged, or made for another backbone.
    """
    metadata = read_head_metadata(path)
    if metadata["upsampler"] not in METHODS:
        require_in_library(metadata["upsampler"])
        raise HeadError(f"{path} holds an unknown upsampler {metadata['upsampler']!r}")
    if backbone is not None:
        check_fit(path, metadata["backbone"], backbone)
    method = METHODS[metadata["upsampler"]]
    if metadata["stored_as"] != method.name:
        warnings.warn(
            f"{path} is a head of {method.name}, which was called {metadata['stored_as']} then",
            RenamedWarning,
            stacklevel=2,
        )
    try:
        # Without memory first: a damaged configuration may ask for any amount of it.
        with torch.device("meta"):
            expected = _build(method, metadata["config"]).state_dict()
    except UsageError as error:
        raise HeadError(
            f"the configuration in the head file {path} is unusable: {error}"
        ) from error
    state = _read_state(path)
    _check_state(path, state, expected)
    head = _build(method, metadata["config"])
    head.load_state_dict(state)
    head.fingerprint = fingerprint(state) if state else head.name
    if backbone is not None:
        head.use_with(backbone.mean, backbone.std)
    return head.eval().requires_grad_(False)


def _build(method: Method, options: Mapping[str, Any]) -> Upsampler:
    if method.config is None:  # plain arguments, which nothing else checks
        usual = method.build({}).options()
        for key, value in options.items():
            fits = key in usual and type(value) in (int, type(usual[key])) and abs(value) < 1e6
            if not fits:
                raise UsageError(f"{method.name} has no {key} {str(value)[:40]!r}")
    return method.build(options)


def _read_state(path: str | Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise HeadError(f"the head file {path} is damaged: {error}") from error


def _check_state(path: str | Path, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    missing = sorted(set(expected) - set(state))
    unexpected = sorted(set(state) - set(expected))
    if missing or unexpected:
        raise HeadError(
            f"the head file {path} does not hold the parameters its configuration asks for: "
            f"missing {missing or 'none'}, unexpected {unexpected or 'none'}"
        )
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise HeadError(
                f"the head file {path} is damaged: {name} has shape {list(tensor.shape)}, "
                f"its configuration asks for {list(expected[name].shape)}"
            )
        if tensor.dtype not in (*_FLOATS, expected[name].dtype):
            raise HeadError(f"the head file {path} is damaged: {name} holds {tensor.dtype}")
        if not torch.isfinite(tensor).all():
            raise HeadError(f"the head file {path} is damaged: {name} holds NaN or infinity")


def same_backbone(made_for: Mapping[str, Any], backbone: BackboneLike) -> bool:
    """Is it the one by name, or one with exactly its weights (a local copy of a checkpoint)?"""
    in_use = describe_backbone(backbone)
    return any(made_for.get(key) == in_use[key] for key in ("name", "fingerprint"))


def is_other_version(made_for: str, in_use: str) -> bool:
    """Whether both names are of the shipped backbone, but of different versions of it."""
    return made_for != in_use and all(n.startswith("embedded.") for n in (made_for, in_use))


def check_fit(path: str | Path, made_for: Mapping[str, Any], backbone: BackboneLike) -> None:
    """Raise a HeadError that names every difference between two backbones that matters."""
    if made_for.get("name") == ANY:
        return
    in_use = describe_backbone(backbone)
    same = same_backbone(made_for, backbone)
    differences = {
        key: f"{key} {made_for.get(key)} (in use: {in_use[key]})"
        for key in ("name", "layer", "channels", "stride")
        if made_for.get(key) != in_use[key] and not (key == "name" and same)
    }
    if not differences:
        return
    what = "another layer" if same and "layer" in differences else "another backbone"
    raise HeadError(
        f"the head {path} was made for {what}: {'; '.join(differences.values())}; "
        + _way_on(made_for, backbone, same)
    )


def _way_on(made_for: Mapping[str, Any], backbone: BackboneLike, same: bool) -> str:
    name = str(made_for.get("name"))
    architecture, local, _ = name.partition(".local-")
    if same:
        return f"use --layer {made_for.get('layer')}, or a head of this layer"
    if is_other_version(name, backbone.name):
        return (
            f"{name} is no longer shipped: use a head of {backbone.name}, or train one with "
            "`fmupsample train`"
        )
    if local:  # a name that only says which file of weights it was
        return (
            f"use --backbone {architecture} --backbone-weights FILE with the weights it was "
            f"trained on, or a head of {backbone.name}"
        )
    return f"use --backbone {loadable_name(name)}, or a head of {backbone.name}"


def loadable_name(name: str) -> str:
    """A backbone's recorded name as ``load_backbone`` takes it: the shipped one has a version."""
    return "embedded" if name.startswith("embedded.") else name
