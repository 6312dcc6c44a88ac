"""The backbone shipped with the package, and any file of the same format.

A backbone file is safetensors with this header (all values strings): ``format``
``fmupsample-backbone/1``; ``architecture`` of timm; ``model_args``, JSON keyword arguments for it,
those of :mod:`fmupsample.backbones.model_args`;
``tag``, the name of these weights; ``mean`` and ``std``, JSON lists; ``image_size``, the short side
in pixels that suits it; ``card``, JSON about data, recipe, metrics and limits.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from fmupsample.backbones.building import build_model
from fmupsample.backbones.model_args import check_architecture, check_model_args
from fmupsample.errors import BackboneError

FORMAT = "fmupsample-backbone/1"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FIELDS = ("architecture", "model_args", "tag", "mean", "std", "image_size", "card")


@dataclass(frozen=True)
class BackboneHeader:
    """The header of a backbone file, parsed."""

    architecture: str
    model_args: dict[str, Any]
    tag: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int
    card: dict[str, Any]


def embedded_path() -> Path:
    """The shipped backbone file.

    Raises:
        BackboneError: this installation has none.
    """
    from fmupsample_weights import FOLDER, find_weights

    path = find_weights("embedded")
    if path is None:
        raise BackboneError(
            f"the embedded backbone is missing from this installation ({FOLDER} has no "
            "embedded.safetensors); reinstall fmupsample, or name another --backbone"
        )
    return path


def is_backbone_file(path: str | Path) -> bool:
    """Whether ``path`` is a safetensors file whose header says it is a backbone of this format."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format", "").startswith("fmupsample-backbone/")
    except (SafetensorError, OSError):
        return False


def read_header(path: str | Path) -> BackboneHeader:
    """The parsed header of the backbone file ``path``.

    Raises:
        BackboneError: not a readable backbone file, or one of another version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
    except FileNotFoundError as error:
        raise BackboneError(f"{path} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise BackboneError(
            f"{path} is damaged or no safetensors file ({error}); get it again "
            "(for the embedded model: reinstall fmupsample)"
        ) from error
    if metadata.get("format") != FORMAT:
        raise BackboneError(
            f"{path} is no backbone file this version reads: its header says format "
            f"{metadata.get('format')!r}, {FORMAT!r} is expected"
        )
    absent = [field for field in _FIELDS if field not in metadata]
    if absent:
        raise BackboneError(f"{path}: the header lacks {', '.join(absent)}")
    try:
        mean, std = (tuple(float(v) for v in json.loads(metadata[k])) for k in ("mean", "std"))
        if len(mean) != 3 or len(std) != 3:
            raise ValueError("mean and std must have three numbers each")
        if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
            raise ValueError("mean and std must be finite, and std positive")
        return BackboneHeader(
            architecture=check_architecture(metadata["architecture"]),
            model_args=check_model_args(
                dict(json.loads(metadata["model_args"])), sum(map(math.prod, shapes))
            ),
            tag=metadata["tag"],
            mean=mean,
            std=std,
            image_size=int(metadata["image_size"]),
            card=dict(json.loads(metadata["card"])),
        )
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        raise BackboneError(f"{path}: the header cannot be understood ({error})") from error


def load_backbone_file(path: str | Path) -> tuple[nn.Module, BackboneHeader]:
    """Build the model of the backbone file ``path`` and load its weights, strictly, as float32.

    Raises:
        BackboneError: damaged, or weights and architecture do not belong together.
    """
    from fmupsample.backbones.checkpoint import _some

    header = read_header(path)
    args = {key: value for key, value in header.model_args.items() if key != "num_classes"}
    model = build_model(header.architecture, model_args=args)
    own = model.state_dict()
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BackboneError(f"{path} is damaged ({error}); get it again") from error
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    wrong = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    if missing or unexpected or wrong:
        parts = [
            _some("missing", missing), _some("unexpected", unexpected), _some("wrong shape", wrong)
        ]  # fmt: skip
        raise BackboneError(
            f"{path} does not hold the weights of {header.architecture}: "
            f"{'; '.join(filter(None, parts))}"
        )
    odd = [v.dtype for v in state.values() if v.is_floating_point() and v.dtype not in _FLOATS]
    if odd:
        raise BackboneError(f"{path} holds {odd[0]}; save its weights as torch.float16")
    if not all(bool(torch.isfinite(v).all()) for v in state.values() if v.is_floating_point()):
        raise BackboneError(f"{path} holds weights that are not finite; get it again")
    model.load_state_dict(state)
    return model, header
