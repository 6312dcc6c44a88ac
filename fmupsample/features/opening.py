"""From a file to the array in it."""

from __future__ import annotations

from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fmupsample.errors import FeaturesError
from fmupsample.features.array import FeatureArray
from fmupsample.features.compact import CompactFeatures
from fmupsample.features.dense import DenseFeatures
from fmupsample.features.layout import FORMAT, Layout
from fmupsample.images.find import printable

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_WEIGHTS = (torch.uint8, torch.float16, torch.float32)


def open_features(path: str | Path, *, device: torch.device | str = "cpu") -> FeatureArray:
    """A feature file of ``fmupsample extract`` as an array ``[V, H, W]``.

    Compact files, whole maps in safetensors and npy: all are mapped into memory, and behave alike.

    Args:
        device: where results are made.

    Raises:
        FeaturesError: missing, damaged, no feature file, or of a later version.
    """
    path = Path(path)
    if not path.is_file():
        raise FeaturesError(f"there is no feature file {printable(path)}")
    if path.suffix == ".npy":
        return DenseFeatures(_numpy(path), {}, device)
    if path.suffix == ".pt":
        raise FeaturesError(
            f"{printable(path)}: pt files are read with torch.load(path, weights_only=True)"
        )
    try:
        with safe_open(path, framework="pt") as file:
            meta = dict(file.metadata() or {})
            names = set(file.keys())
            # Tensors of this library are views of the mapped file.
            found = {k: file.get_tensor(k) for k in names & {"features", "values", "weights"}}
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        raise FeaturesError(
            f"{printable(path)} is not a readable safetensors file (damaged or cut off?): {error}"
        ) from error
    stated = meta.get("format", "")
    if stated == FORMAT:
        return _compact(path, found, meta, device)
    if stated.startswith(FORMAT.partition("/")[0]):
        raise FeaturesError(
            f"{printable(path)} has the format {stated!r}; this version reads {FORMAT!r}"
        )
    features = found.get("features")
    if features is None or features.ndim != 3 or features.dtype not in _FLOATS:
        raise FeaturesError(
            f"{printable(path)} holds no features [C, H, W]: is it a file of `fmupsample extract`?"
        )
    return DenseFeatures(features, meta, device)


def _compact(
    path: Path, found: dict[str, Tensor], meta: dict[str, str], device: Any
) -> CompactFeatures:
    def damaged(reason: object) -> FeaturesError:
        return FeaturesError(f"the compact file {printable(path)} is damaged: {reason}")

    try:
        layout = Layout.from_json(meta["layout"])
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise damaged(f"its layout is not readable ({error})") from error
    values, weights = found.get("values"), found.get("weights")
    if values is None or values.ndim != 3 or values.dtype not in _FLOATS or not values.numel():
        raise damaged("it has no values [V, h, w]")
    if any(n > pixels for n, pixels in zip(values.shape[1:], layout.full, strict=True)):
        raise damaged(f"values {list(values.shape)} for a map of {list(layout.full)} pixels")
    shape = layout.weights_shape
    if (weights is None) != (shape is None):
        raise damaged("weights are missing" if shape else "it has weights that it does not need")
    if weights is not None and (tuple(weights.shape) != shape or weights.dtype not in _WEIGHTS):
        raise damaged(f"weights {weights.dtype} {list(weights.shape)} in place of {list(shape)}")
    return CompactFeatures(values, weights, layout, meta, device)


def _numpy(path: Path) -> Tensor:
    try:
        # Copy on write: torch knows no arrays that must not be written to.
        array = np.load(path, mmap_mode="c", allow_pickle=False)
        if array.ndim != 3 or array.dtype not in (np.float16, np.float32):
            raise ValueError(f"it holds {array.dtype} {list(array.shape)}, not features [C, H, W]")
        return torch.from_numpy(array)
    # numpy reads the header as Python does.
    except (OSError, ValueError, EOFError, SyntaxError, TokenError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise FeaturesError(
            f"{printable(path)} is not a readable feature file: {reason}"
        ) from error
