"""What the header of a backbone file may ask of timm.

A header comes with the file, from anywhere. ``timm.create_model`` takes arguments that read other
files (``checkpoint_path``, ``pretrained_cfg``), follow addresses (``pretrained``, names such as
``hf-hub:...``) or build a model of any size, so that only shapes and switches get through, each in
its range.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import timm

Check = Callable[[Any], bool]


def _whole(low: int, high: int) -> Check:
    return lambda value: type(value) is int and low <= value <= high


def _number(low: float, high: float) -> Check:
    return lambda value: (
        type(value) in (int, float) and math.isfinite(value) and low <= value <= high
    )


def _several(check: Check, most: int) -> Check:
    return lambda value: (
        type(value) is list and 1 <= len(value) <= most and all(check(item) for item in value)
    )


def _either(*checks: Check) -> Check:
    return lambda value: any(check(value) for check in checks)


def _switch(value: Any) -> bool:
    return type(value) is bool


_POOLINGS = ("", "avg", "avgmax", "max", "token", "map", "catavgmax")
_SIZE = _either(_whole(1, 4096), _several(_whole(1, 4096), 2))
_PATCH = _either(_whole(1, 128), _several(_whole(1, 128), 2))
_DEPTH = _whole(1, 256)
_WIDTH = _whole(1, 8192)
_RATIO = _number(0.01, 32)

# Arguments of timm's constructors, and what they may be.
ALLOWED: dict[str, Check] = {
    "class_token": _switch,
    "depth": _DEPTH,
    "depths": _several(_DEPTH, 8),
    "dims": _several(_WIDTH, 8),
    "drop_path_rate": _number(0, 1),
    "drop_rate": _number(0, 1),
    "dynamic_img_size": _switch,
    "embed_dim": _either(_WIDTH, _several(_WIDTH, 8)),
    "fc_norm": _switch,
    "final_norm": _switch,
    "global_pool": lambda value: value in _POOLINGS,
    "img_size": _SIZE,
    "in_chans": _whole(3, 3),
    "init_values": _either(_number(0, 10), lambda value: value is None),
    "mlp_ratio": _either(_RATIO, _several(_RATIO, 8)),
    "no_embed_class": _switch,
    "num_classes": _whole(0, 100_000),
    "num_heads": _either(_whole(1, 256), _several(_whole(1, 256), 8)),
    "patch_size": _PATCH,
    "pre_norm": _switch,
    "qk_norm": _switch,
    "qkv_bias": _switch,
    "reg_tokens": _whole(0, 256),
    "strict_img_size": _switch,
    "use_fc_norm": _switch,
    "window_size": _PATCH,
}


def check_architecture(name: Any) -> str:
    """``name``, if it is one of timm's architectures, without tag, address or path.

    Raises:
        ValueError: it is not.
    """
    plain = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_]+", name)
    if not plain or not timm.is_model(name):
        raise ValueError(f"architecture {str(name)[:80]!r} is none of timm's")
    return name


def check_model_args(args: dict[str, Any], parameters: int) -> dict[str, Any]:
    """``args``, if every one of them is in :data:`ALLOWED` and within its range.

    Args:
        args: keyword arguments from a header.
        parameters: how many numbers the file holds. A transformer has at least ``4 C^2`` a block.

    Raises:
        ValueError: an argument or value that is not taken, or a model the file cannot hold.
    """
    for key, value in args.items():
        if key not in ALLOWED:
            raise ValueError(f"model_args may not hold {key[:80]!r}")
        if not ALLOWED[key](value):
            raise ValueError(f"model_args: {key} cannot be {str(value)[:80]}")
    depths, widths = args.get("depths", args.get("depth", 1)), args.get("embed_dim", 1)
    blocks = sum(depths) if isinstance(depths, list) else depths
    width = min(widths) if isinstance(widths, list) else widths
    if blocks * max(100, 4 * width**2) > parameters:
        raise ValueError("model_args describe a larger model than the file holds")
    return args
