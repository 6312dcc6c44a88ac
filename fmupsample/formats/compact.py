"""Compact files: low-resolution values and kernel weights, of which any part of a map is made."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmupsample.formats.array import Between, FeatureArray, affine_map
from fmupsample.formats.files import SafetensorsFile, raw_bytes
from fmupsample.formats.layout import FORMAT, WEIGHT_BITS, Layout, decode_weights
from fmupsample.formats.resampling import Taps, taps
from fmupsample.ops import reassemble_points, reassemble_window

# Shares gathered at once, in numbers: points are worked on a few thousand at a time.
_GATHERED = 1 << 22


class CompactFeatures(FeatureArray):
    """Low-resolution values and kernel weights; see :mod:`fmupsample.formats.layout`.

    Args:
        values: ``[V, h, w]``.
        weights: ``[K*K, H, W]`` as stored, usually mapped from a file; ``None`` for K = 1.
    """

    def __init__(
        self,
        values: Tensor,
        weights: Tensor | None,
        layout: Layout,
        meta: Mapping[str, str],
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__((values.shape[0], *layout.size), meta, device)
        self.values = values
        self.weights = weights
        self.layout = layout
        self._float: Tensor | None = None

    def map(self, weight: Any, bias: Any = None) -> CompactFeatures:
        # Kernel weights sum to 1, so an affine map may be applied to the few values first.
        weight, bias = affine_map(weight, bias, self.shape[0])
        values = torch.einsum("nc,chw->nhw", weight, self.values.float())
        values += bias[:, None, None]
        return CompactFeatures(values, self.weights, self.layout, self.meta, self.device)

    def _window(self, channels: range, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        down, across = (
            axis[torch.arange(*wanted)]
            for axis, wanted in zip(self._axes(), (rows, columns), strict=True)
        )
        (y0, y1), (x0, x1) = down.bounds(), across.bounds()
        value = self._values(channels)
        out = reassemble_window(
            value[None],
            self._weights(y0, y1, x0, x1)[None],
            self.layout.full,
            (y0, x0),
            fractional=self._fractional,
        )[0]
        if self.layout.size != self.layout.crop:
            out = across.apply(down.apply(out, 1, y0), 2, x0)
        return out

    def _points(self, channels: range, y: Between, x: Between) -> Tensor:
        down, across = (
            axis.between(*wanted) for axis, wanted in zip(self._axes(), (y, x), strict=True)
        )
        value = self._values(channels)
        out = torch.empty(len(down.index), len(value), device=self.device)
        pixels = down.index.shape[1] * across.index.shape[1]
        step = max(1, _GATHERED // (pixels * max((self.layout.kernel_size + 1) ** 2, len(value))))
        for i in range(0, len(out), step):
            some = slice(i, i + step)
            out[some] = self._mixed(value, down[some], across[some])
        return out

    def _mixed(self, value: Tensor, down: Taps, across: Taps) -> Tensor:
        """``[n, V]``: the weighted pixels of the crop that each point lies between."""
        rows = down.index[:, :, None].expand(-1, -1, across.index.shape[1])
        columns = across.index[:, None, :].expand_as(rows)
        share = (down.share[:, :, None] * across.share[:, None, :]).to(value)
        rows, columns = rows.flatten(), columns.flatten()
        if self.weights is None:
            weights = value.new_ones(1, len(rows))
        else:
            weights = decode_weights(self.weights[:, rows, columns].to(self.device))
        found = reassemble_points(
            value,
            weights,
            rows.to(self.device),
            columns.to(self.device),
            self.layout.full,
            fractional=self._fractional,
        )
        return torch.einsum("npv,np->nv", found.unflatten(0, (len(share), -1)), share.flatten(1))

    @property
    def _fractional(self) -> bool:
        return self.layout.neighbours == "fine"

    def _axes(self) -> tuple[Taps, Taps]:
        crop, size = self.layout.crop, self.layout.size
        averaged = any(s < c for s, c in zip(size, crop, strict=True))
        down, across = zip(crop, size, strict=True)
        return taps(*down, averaged=averaged), taps(*across, averaged=averaged)

    def _values(self, channels: range) -> Tensor:
        if self._float is None:  # small, and wanted by every call
            self._float = self.values.to(self.device, torch.float32)
        if len(channels) == len(self._float) and channels.step == 1:
            return self._float
        return self._float[torch.tensor(channels, device=self.device)]

    def _weights(self, y0: int, y1: int, x0: int, x1: int) -> Tensor:
        if self.weights is None:
            return torch.ones((), device=self.device).expand(1, y1 - y0, x1 - x0)
        return decode_weights(self.weights[:, y0:y1, x0:x1].to(self.device))


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
