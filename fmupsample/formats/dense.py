"""A whole map on disk as an array, mapped into memory: only what is asked for is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fmupsample.formats.array import Between, FeatureArray, affine_map


class DenseFeatures(FeatureArray):
    """A map ``[V, H, W]`` as stored, and an affine map that is applied to what is read of it."""

    def __init__(
        self,
        features: Tensor,
        meta: Mapping[str, str],
        device: torch.device | str = "cpu",
        affine: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        channels = features.shape[0] if affine is None else len(affine[0])
        super().__init__((channels, *features.shape[1:]), meta, device)
        self.features = features
        self._affine = affine

    def map(self, weight: Any, bias: Any = None) -> DenseFeatures:
        weight, bias = affine_map(weight, bias, self.shape[0])
        if self._affine is not None:
            weight, bias = weight @ self._affine[0], weight @ self._affine[1] + bias
        return DenseFeatures(self.features, self.meta, self.device, (weight, bias))

    def _window(self, channels: range, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        part = self.features[:, slice(*rows), slice(*columns)]
        return self._of(channels, part)

    def _points(self, channels: range, y: Between, x: Between) -> Tensor:
        found = torch.zeros((), device=self.device)
        for row, down in ((y[0], 1 - y[2]), (y[1], y[2])):
            for column, across in ((x[0], 1 - x[2]), (x[1], x[2])):
                pixels = self._of(channels, self.features[:, row, column])
                found = found + pixels * (down * across).to(pixels)
        return found.T.contiguous()

    def _of(self, channels: range, part: Tensor) -> Tensor:
        """Channels of what was read, ``[C, ...]`` -> float32 ``[V', ...]``."""
        index = torch.tensor(channels)
        if self._affine is None:
            some = slice(channels.start, channels.stop) if channels.step == 1 else index
            part = part[some]
            return part.to(self.device, torch.float32, copy=True)
        weight, bias = (t[index].to(self.device) for t in self._affine)
        flat = part.to(self.device, torch.float32).flatten(1)
        return torch.addmm(bias[:, None], weight, flat).unflatten(1, part.shape[1:])
