"""From a file to the array in it."""

from __future__ import annotations

import io
import json
from math import prod
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fmupsample.errors import FeaturesError
from fmupsample.formats.array import FeatureArray
from fmupsample.formats.compact import CompactFeatures
from fmupsample.formats.dense import DenseFeatures
from fmupsample.formats.layout import FORMAT, Layout
from fmupsample.images.find import printable

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_STORED = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8,
}  # fmt: skip
_TENSORS = {"features", "values", "weights", "global"}
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
    if path.suffix == ".tar":
        raise FeaturesError(f"{printable(path)} holds several: use fmupsample.open_shards(path)")
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
            found = {k: file.get_tensor(k) for k in names & _TENSORS}
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        raise FeaturesError(
            f"{printable(path)} is not a readable safetensors file (damaged or cut off?): {error}"
        ) from error
    return _array(printable(path), found, meta, device)


def open_part(
    path: Path, offset: int, size: int, suffix: str, shown: str, device: torch.device | str = "cpu"
) -> FeatureArray:
    """As :func:`open_features`, of a file that lies inside another.

    Args:
        shown: what messages call it.
    """
    if suffix not in (".safetensors", ".npy"):
        raise FeaturesError(f"{shown} is a {suffix} file, not features")
    try:
        # Copy on write: torch knows no arrays that must not be written to.
        data = np.memmap(path, np.uint8, "c", offset, (size,))
        if suffix == ".npy":
            return DenseFeatures(_numpy_inside(data), {}, device)
        found, meta = _safetensors_inside(data)
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError,
        SyntaxError, TokenError, OverflowError, MemoryError,
    ) as error:  # fmt: skip
        raise FeaturesError(f"{shown} is damaged: {str(error).partition(chr(10))[0]}") from error
    return _array(shown, found, meta, device)


def _safetensors_inside(data: np.ndarray) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Views of the tensors in the bytes of a file, and its metadata."""
    begin = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if not 8 < begin <= len(data):
        raise ValueError("its header is longer than it")
    header = json.loads(data[8:begin].tobytes())
    meta = header.pop("__metadata__", {})
    if not all(isinstance(value, str) for value in meta.values()):
        raise ValueError("its metadata is no text")
    found = {}
    for name in header.keys() & _TENSORS:
        entry = header[name]
        kind, shape = _STORED[entry["dtype"]], [int(n) for n in entry["shape"]]
        start, end = (begin + int(n) for n in entry["data_offsets"])
        right = begin <= start <= end <= len(data) and end - start == prod(shape) * kind.itemsize
        if not right or min(shape, default=0) < 1:
            raise ValueError(f"{name} does not lie in it")
        found[name] = torch.from_numpy(data[start:end]).view(kind).reshape(shape)
    return found, meta


def _numpy_inside(data: np.ndarray) -> Tensor:
    file = io.BytesIO(data[:4096].tobytes())
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("it is not an npy file of this program")
    shape, by_columns, kind = np.lib.format.read_array_header_1_0(file)
    begin, size = file.tell(), prod(shape) * kind.itemsize
    if by_columns or len(shape) != 3 or kind not in (np.float16, np.float32) or min(shape) < 1:
        raise ValueError(f"it holds {kind} {list(shape)}, not features [C, H, W]")
    if begin + size != len(data):
        raise ValueError("it is longer or shorter than its header says")
    return torch.from_numpy(data[begin:].view(kind).reshape(shape))


def _array(
    shown: str, found: dict[str, Tensor], meta: dict[str, str], device: torch.device | str
) -> FeatureArray:
    stated = meta.get("format", "")
    if stated == FORMAT:
        return _compact(shown, found, meta, device)
    if stated.startswith(FORMAT.partition("/")[0]):
        raise FeaturesError(f"{shown} has the format {stated!r}; this version reads {FORMAT!r}")
    features = found.get("features")
    if features is None or features.ndim != 3 or features.dtype not in _FLOATS:
        raise FeaturesError(
            f"{shown} holds no features [C, H, W]: is it a file of `fmupsample extract`?"
        )
    return _with_vector(shown, DenseFeatures(features, meta, device), found)


def _with_vector(shown: str, array: FeatureArray, found: dict[str, Tensor]) -> FeatureArray:
    vector = found.get("global")
    if vector is not None:
        if vector.ndim != 1 or vector.dtype not in _FLOATS:
            raise FeaturesError(f"{shown} is damaged: its global vector is {list(vector.shape)}")
        array.global_vector = vector.float().to(array.device)
    return array


def _compact(
    shown: str, found: dict[str, Tensor], meta: dict[str, str], device: Any
) -> FeatureArray:
    def damaged(reason: object) -> FeaturesError:
        return FeaturesError(f"the compact file {shown} is damaged: {reason}")

    try:
        layout = Layout.from_json(meta["layout"])
    except (
        KeyError, ValueError, TypeError, IndexError, OverflowError, RecursionError,
    ) as error:  # fmt: skip
        raise damaged(f"its layout is not readable ({error})") from error
    values, weights = found.get("values"), found.get("weights")
    if values is None or values.ndim != 3 or values.dtype not in _FLOATS or not values.numel():
        raise damaged("it has no values [V, h, w]")
    if any(n > pixels for n, pixels in zip(values.shape[1:], layout.full, strict=True)):
        raise damaged(f"values {list(values.shape)} for a map of {list(layout.full)} pixels")
    shape = layout.weights_shape
    if weights is None and shape is not None:
        raise damaged("weights are missing")
    if weights is not None and shape is None:
        raise damaged("it has weights that it does not need")
    wrong = weights is not None and (tuple(weights.shape) != shape or weights.dtype not in _WEIGHTS)
    if wrong and shape is not None and weights is not None:
        raise damaged(f"weights {weights.dtype} {list(weights.shape)} in place of {list(shape)}")
    return _with_vector(shown, CompactFeatures(values, weights, layout, meta, device), found)


def _numpy(path: Path) -> Tensor:
    try:
        # Copy on write: torch knows no arrays that must not be written to.
        array = np.load(path, mmap_mode="c", allow_pickle=False)
        if array.ndim != 3 or array.dtype not in (np.float16, np.float32):
            raise ValueError(f"it holds {array.dtype} {list(array.shape)}, not features [C, H, W]")
        return torch.from_numpy(array)
    # numpy reads the header as Python does.
    except (
        OSError, ValueError, EOFError, SyntaxError, TokenError, TypeError, OverflowError,
        RecursionError, MemoryError,
    ) as error:  # fmt: skip
        reason = str(error).partition("\n")[0]
        raise FeaturesError(
            f"{printable(path)} is not a readable feature file: {reason}"
        ) from error
