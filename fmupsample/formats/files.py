"""One feature map per file, written channel slice by channel slice so that memory stays bounded.

``safetensors`` holds ``features``, ``global`` where it is wanted, and string metadata in its
header; ``npy`` the bare array (its metadata is in the manifest); ``pt`` a dict of the tensors and
the metadata, which ``torch.load(path, weights_only=True)`` reads.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor

from fmupsample.errors import UsageError

VECTOR = "global"  # the name of the vector of the whole picture
_META = "__metadata__"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class TensorFile:
    """A file that receives a ``[C, H, W]`` map in slices ``[c, H, W]`` of the file's dtype (CPU).

    Args:
        path: created or overwritten; call :meth:`close` when all slices are in.
        shape: ``(C, H, W)``.
        meta: strings about the map.
        vector: of the whole picture, ``[D]``, to be kept beside the map.
    """

    suffix: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "bf16")

    def __init__(
        self,
        path: Path,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        meta: dict[str, str],
        vector: Tensor | None = None,
    ) -> None:
        self.shape, self.dtype, self.meta, self.vector = shape, dtype, meta, vector
        self._channels = 0
        self._file: BinaryIO = path.open("wb")
        try:
            self._begin()
        except BaseException:
            self._file.close()
            raise

    def append(self, rows: Tensor) -> None:
        """The next channels."""
        if rows.dtype != self.dtype or tuple(rows.shape[1:]) != self.shape[1:]:
            raise ValueError(f"{rows.dtype} {list(rows.shape)} does not continue {self.shape}")
        self._channels += rows.shape[0]
        self._add(rows.contiguous())

    def close(self) -> None:
        """Finish the file; ValueError if channels are missing."""
        try:
            if self._channels != self.shape[0]:
                raise ValueError(f"{self._channels} of {self.shape[0]} channels were written")
            self._end()
        finally:
            self._file.close()

    def discard(self) -> None:
        """Close without finishing."""
        with contextlib.suppress(OSError):  # a full disk: what is in hand cannot be written either
            self._file.close()

    def _begin(self) -> None:
        """Write what comes before the numbers."""

    def _add(self, rows: Tensor) -> None:
        self._file.write(raw_bytes(rows))

    def _end(self) -> None:
        """Write what comes after the numbers."""


def raw_bytes(rows: Tensor) -> memoryview:
    """The numbers of a contiguous tensor as they lie in memory; numpy has no bfloat16."""
    # Flat first: a contiguous [64, 1, 1] may have any strides.
    return rows.reshape(-1).view(torch.uint8).numpy().data


class SafetensorsFile(TensorFile):
    """https://github.com/huggingface/safetensors#format: header length, JSON header, raw data."""

    suffix = ".safetensors"
    _NAMES: ClassVar = {
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.uint8: "U8",
    }

    def _begin(self) -> None:
        entry = self._entry(self.dtype, self.shape, 0)
        self._write_header({_META: self.meta, "features": entry})

    def _end(self) -> None:
        if self.vector is not None:
            self._file.seek(0, os.SEEK_END)
            self._file.write(raw_bytes(self.vector))

    def _entry(self, dtype: torch.dtype, shape: tuple[int, ...], start: int) -> dict[str, Any]:
        end = start + math.prod(shape) * dtype.itemsize
        return {"dtype": self._NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}

    def _write_header(self, header: dict[str, Any]) -> int:
        """Write it, with the vector as the last entry; where the data begins."""
        if self.vector is not None:
            start = max(entry["data_offsets"][1] for name, entry in header.items() if name != _META)
            header[VECTOR] = self._entry(self.vector.dtype, tuple(self.vector.shape), start)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the data is aligned for memory mapping
        self._file.write(len(text).to_bytes(8, "little") + text)
        return 8 + len(text)


class NpyFile(TensorFile):
    """A bare numpy array; numpy has no bfloat16."""

    suffix = ".npy"
    dtypes = ("fp32", "fp16")
    _TYPES: ClassVar = {torch.float32: np.float32, torch.float16: np.float16}

    def _begin(self) -> None:
        kind = np.lib.format.dtype_to_descr(np.dtype(self._TYPES[self.dtype]))
        header = {"descr": kind, "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(self._file, header)


class PtFile(TensorFile):
    """``{"features": Tensor, "meta": {str: str}}``. Needs the whole map in memory."""

    suffix = ".pt"

    def _begin(self) -> None:
        self._parts: list[Tensor] = []

    def _add(self, rows: Tensor) -> None:
        self._parts.append(rows)

    def _end(self) -> None:
        # A copy where a slice is a view: torch.save would write all that lies behind it.
        whole = self._parts[0].clone() if len(self._parts) == 1 else torch.cat(self._parts)
        # By way of memory: written to directly, torch hides the error of a full disk.
        buffer = io.BytesIO()
        found = {"features": whole, "meta": self.meta}
        if self.vector is not None:
            found[VECTOR] = self.vector
        torch.save(found, buffer)
        self._file.write(buffer.getbuffer())


FORMATS: dict[str, type[TensorFile]] = {
    "safetensors": SafetensorsFile,
    "npy": NpyFile,
    "pt": PtFile,
}
# Values and kernel weights in place of the map, see fmupsample.formats.layout.
COMPACT = "compact"


def suffix_of(name: str) -> str:
    """Of the files of a format, with its dot."""
    return SafetensorsFile.suffix if name == COMPACT else FORMATS[name].suffix


def check_format(name: str, dtype: str) -> None:
    """Raise UsageError for an unknown format or dtype, or a pair that cannot be written."""
    if name != COMPACT and name not in FORMATS:
        raise UsageError(f"format {name!r} is unknown: use {', '.join([*FORMATS, COMPACT])}")
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown: use {', '.join(DTYPES)}")
    if name != COMPACT and dtype not in FORMATS[name].dtypes:
        raise UsageError(
            f"format {name} has no {dtype}: use --dtype {' or '.join(FORMATS[name].dtypes)}, "
            "or --format safetensors"
        )


def file_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """About how many bytes a file takes: the numbers, and 2 kB for the header."""
    return math.prod(shape) * DTYPES[dtype].itemsize + 2048
