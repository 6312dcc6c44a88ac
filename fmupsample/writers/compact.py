"""Compact files: low-resolution values, then kernel weights, a few rows of pixels at a time."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch
from torch import Tensor

from fmupsample.formats.layout import FORMAT, WEIGHT_BITS, Layout
from fmupsample.writers.formats import SafetensorsFile, raw_bytes


class CompactFile(SafetensorsFile):
    """Receives the values ``[V, h, w]`` in one piece, then weights ``[N, rows, W]`` from the top.

    Args:
        shape: of the values.
        dtype: of the values.
        layout: how the map is made of them.
        weight_bits: 8, 16 or 32.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        meta: dict[str, str],
        *,
        layout: Layout,
        weight_bits: int,
        vector: Tensor | None = None,
    ) -> None:
        self.layout = layout
        self._weights = WEIGHT_BITS[weight_bits]
        self._rows = 0
        meta = {**meta, "format": FORMAT, "layout": layout.to_json()}
        super().__init__(path, shape, dtype, meta, vector)

    def append(self, rows: Tensor) -> None:
        if not self._channels:
            super().append(rows)
            return
        expected, height = self.layout.weights_shape, self._rows + rows.shape[1]
        if (
            expected is None
            or rows.dtype != self._weights
            or (rows.shape[0], height, rows.shape[2]) > expected
            or (rows.shape[0], rows.shape[2]) != (expected[0], expected[2])
        ):
            raise ValueError(f"{rows.dtype} {list(rows.shape)} does not continue {expected}")
        line = expected[2] * self._weights.itemsize
        for n, plane in enumerate(rows):
            self._file.seek(self._start + (n * expected[1] + self._rows) * line)
            self._file.write(raw_bytes(plane))
        self._rows = height

    def close(self) -> None:
        try:
            if self.layout.weights_shape and self._rows != self.layout.weights_shape[1]:
                raise ValueError(f"{self._rows} of {self.layout.weights_shape[1]} rows are there")
        except BaseException:
            self._file.close()
            raise
        super().close()

    def _begin(self) -> None:
        values = prod(self.shape) * self.dtype.itemsize
        header = {"__metadata__": self.meta, "values": self._entry(self.dtype, self.shape, 0)}
        if self.layout.weights_shape is not None:
            header["weights"] = self._entry(self._weights, self.layout.weights_shape, values)
        self._start = self._write_header(header) + values
