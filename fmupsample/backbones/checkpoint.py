"""Local checkpoint files: reading them safely and fitting them to a timm model."""

from __future__ import annotations

import argparse
import pickle
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fmupsample.errors import BackboneError

# Where training code puts the weights, the averaged ones first.
_WRAPPERS = (
    "state_dict_ema", "model_ema", "teacher", "state_dict", "model_state_dict", "model", "module",
    "backbone", "encoder", "net", "student",
)  # fmt: skip
_PREFIXES = ("backbone.", "model.", "encoder.", "image_encoder.", "visual.trunk.", "trunk.", "net.")
# Parts of pretraining that are no part of a feature map; files may have them.
_NOT_NEEDED = (
    "head", "fc.", "fc_norm", "classifier", "last_layer", "decoder", "mask_token", "attn_pool",
    "projector", "predictor", "prototypes", "text", "logit_scale", "logit_bias", "proj_head",
    "last_linear", "ibot_head", "dino_head", "token_embedding", "ln_final", "positional_embedding",
    "transformer.", "mask_decoder", "prompt_encoder", "dino_loss", "ibot_patch_loss",
)  # fmt: skip
# Parts of the model that do not enter its feature map; files may lack them.
_NOT_USED = ("head", "fc_norm", "attn_pool", "classifier", "num_batches_tracked")
_SHOWN = 4


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors``, ``.pth``, ``.pt`` or ``.bin`` file, unwrapped.

    Pickles are read with ``weights_only=True`` and never otherwise.

    Raises:
        BackboneError: the file is missing, damaged, needs code to load, or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise BackboneError(f"--backbone-weights {path} {what}; give a checkpoint file")
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise BackboneError(f"{path} is only a git-lfs pointer; fetch it with `git lfs pull`")
    # By what it is, whatever it is called: a length, then a JSON object.
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _read_safetensors(path)
    return _unwrap(_read_pickle(path), path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise BackboneError(
            f"{path} is not a whole safetensors file ({error}); download or copy it again"
        ) from error


def _read_pickle(path: Path) -> object:
    try:
        # argparse.Namespace: harmless, and many training scripts store their arguments.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # what is wrong is said below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "global" in str(error).lower():
            raise BackboneError(
                f"{path} holds more than tensors and would run code when loaded, so it is refused; "
                "save its state_dict() alone, best as safetensors, and give that"
            ) from error
        raise BackboneError(f"{path} is not a checkpoint; it is damaged or another format") from (
            error
        )
    # A truncated archive raises any of these, depending on where it ends.
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        if "torchscript" in str(error).lower():
            raise BackboneError(
                f"{path} is a TorchScript program, which is refused because it would run code; "
                "save its state_dict() alone, best as safetensors, and give that"
            ) from error
        raise BackboneError(
            f"{path} cannot be read as a PyTorch checkpoint; it is damaged, incomplete or another "
            "format"
        ) from error


def _unwrap(loaded: object, path: Path) -> dict[str, Tensor]:
    for _ in range(4):
        if not isinstance(loaded, Mapping):
            break
        inner = next((loaded[k] for k in _WRAPPERS if isinstance(loaded.get(k), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    state = (
        {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
        if isinstance(loaded, Mapping)
        else {}
    )
    if not state:
        raise BackboneError(f"{path} holds no weights: no tensors under any of the usual names")
    return state


def load_checkpoint(model: nn.Module, path: str | Path, architecture: str) -> None:
    """Load ``path`` into ``model``: prefixes stripped, names and sizes converted as timm does.

    Classifiers, decoders and the like are ignored.

    Raises:
        BackboneError: unreadable, or for another architecture; the message lists the first
            missing and unexpected names.
    """
    state = read_checkpoint(path)
    state = {k.removeprefix("module.").removeprefix("_orig_mod."): v for k, v in state.items()}
    own = model.state_dict()
    candidates = [_convert(state, model)]
    for prefix in _PREFIXES:
        inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if inner:
            candidates.append(_convert(inner, model))
    best = max(candidates, key=lambda found: _overlap(found, own))

    missing = [k for k in own if k not in best and not any(p in k for p in _NOT_USED)]
    unexpected = [k for k in best if k not in own and not k.startswith(_NOT_NEEDED)]
    wrong = [
        f"{k} {list(best[k].shape)} instead of {list(own[k].shape)}"
        for k in own
        if k in best and best[k].shape != own[k].shape
    ]
    if missing or unexpected or wrong:
        found = [
            _some("missing", missing), _some("unexpected", unexpected), _some("wrong shape", wrong)
        ]  # fmt: skip
        raise BackboneError(
            f"{path} does not fit {architecture}: {'; '.join(filter(None, found))}; "
            "name the architecture it was trained with (--backbone)"
        )
    model.load_state_dict({k: v for k, v in best.items() if k in own}, strict=False)


def _convert(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """``state`` through timm's own filter for this architecture, which renames and resizes."""
    names = vars(sys.modules[type(model).__module__])
    convert: Callable | None = names.get("checkpoint_filter_fn") or names.get("_filter_fn")
    if convert is None:
        return state
    try:
        return dict(convert(dict(state), model))
    # Filters assume their own family and fail in any way on another's names; then the names are
    # compared as they are and the mismatch is reported.
    except Exception:
        return state


def _overlap(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> int:
    return sum(1 for k, v in state.items() if k in own and own[k].shape == v.shape)


def _some(label: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{label}: {', '.join(names[:_SHOWN])}{more}"
