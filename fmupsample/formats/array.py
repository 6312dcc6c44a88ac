"""What every opened feature file can do, whatever is in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmupsample.errors import UsageError
from fmupsample.images.size import Frame


class FeatureArray:
    """A map ``[V, H, W]`` that is read, or made, as far as it is asked for.

    ``f[:, y0:y1, x0:x1]`` (integers, slices, ``...``) and ``f.full()`` give float32 tensors on
    ``f.device``, ``np.asarray(f)`` a numpy array. Subclasses implement ``_window``, ``_points`` and
    ``map``.

    Attributes:
        shape: ``(V, H, W)``.
        meta: what the file says about itself, strings.
        device: where results are made.
        global_vector: float32 ``[D]`` of the whole picture, of files by ``extract --global``; else
            ``None``.
    """

    global_vector: Tensor | None = None
    dtype = torch.float32
    ndim = 3

    def __init__(
        self, shape: tuple[int, int, int], meta: Mapping[str, str], device: torch.device | str
    ) -> None:
        self.shape = shape
        self.meta = dict(meta)
        self.device = torch.device(device)

    @property
    def frame(self) -> Frame | None:
        """Sizes of the picture's file and canvas, see :class:`fmupsample.images.Frame`."""
        try:
            return Frame.from_json(json.loads(self.meta["frame"]))
        except (KeyError, ValueError, TypeError, IndexError):
            return None

    def full(self) -> Tensor:
        """The whole map, ``[V, H, W]``."""
        return self[:]

    @torch.no_grad()
    def __getitem__(self, key: Any) -> Tensor:
        picked = [_picked(k, n) for k, n in zip(_three(key), self.shape, strict=True)]
        channels, rows, columns = (r for r, _ in picked)
        if all((channels, rows, columns)):
            out = self._rectangle(channels, rows, columns)
        else:
            out = torch.empty(*map(len, (channels, rows, columns)), device=self.device)
        dropped = tuple(i for i, (_, drop) in enumerate(picked) if drop)
        return out.squeeze(dropped) if dropped else out

    def _rectangle(self, channels: range, rows: range, columns: range) -> Tensor:
        (y0, y1), (x0, x1) = _bounds(rows), _bounds(columns)
        # Few pixels far apart cost less one by one than all that lies between them.
        if 8 * len(rows) * len(columns) <= (y1 - y0) * (x1 - x0):
            y, x = torch.tensor(rows), torch.tensor(columns)
            grid = torch.meshgrid(y, x, indexing="ij")
            zero = torch.zeros(grid[0].numel(), dtype=torch.float64)
            pixels = (grid[0].flatten(), grid[0].flatten(), zero)
            across = (grid[1].flatten(), grid[1].flatten(), zero)
            found = self._points(channels, pixels, across)  # [n, V']
            return found.T.unflatten(1, grid[0].shape).contiguous()
        out = self._window(channels, (y0, y1), (x0, x1))
        for dim, wanted, first in ((1, rows, y0), (2, columns, x0)):
            if wanted.step != 1:
                out = out.index_select(dim, torch.tensor(wanted, device=out.device) - first)
        return out

    @torch.no_grad()
    def at(self, points: Any, *, original: bool = False) -> Tensor:
        """Features at points, bilinear between pixel centres.

        Args:
            points: ``(x, y)`` pairs, ``[n, 2]``: x to the right, y down, in pixels of this map; the
                centre of its first pixel is ``(0.5, 0.5)``, so ``f.at([(x + 0.5, y + 0.5)])`` is
                ``f[:, y, x]``. Beyond the outermost centres the border's features go on.
            original: the points are in pixels of the picture's own file instead (upright).

        Returns:
            ``[n, V]``.

        Raises:
            UsageError: not such points, or NaN among them; ``original`` where the file says no
                size.
        """
        where = torch.as_tensor(np.asarray(points, dtype=np.float64))
        if where.ndim != 2 or where.shape[1] != 2 or not torch.isfinite(where).all():
            raise UsageError(f"points must be finite (x, y) pairs [n, 2], got {list(where.shape)}")
        _, height, width = self.shape
        if original:
            if self.frame is None:
                raise UsageError("this file does not say how large its picture was")
            rows, columns = self.frame.original
            where = where * torch.tensor([width / columns, height / rows], dtype=torch.float64)
        if not len(where):
            return torch.empty(0, self.shape[0], device=self.device)
        x, y = (_between(where[:, i], n) for i, n in ((0, width), (1, height)))
        return self._points(range(self.shape[0]), y, x)

    def map(self, weight: Any, bias: Any = None) -> FeatureArray:
        """``weight @ f + bias`` at every pixel, as an array of the same kind.

        Nothing is computed for pixels until they are asked for. A linear probe, a projection or a
        similarity costs its few channels, not those of the features.

        Args:
            weight: ``[V', V]`` (or ``[V', V, 1, 1]``, of a 1x1 convolution).
            bias: ``[V']``.
        """
        raise NotImplementedError

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("the map is made when it is asked for: there is nothing to share")
        array = self.full().cpu().numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, source={self.meta.get('source')!r})"

    # -- for subclasses -----------------------------------------------------------------------

    def _window(self, channels: range, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        """``[V', H', W']`` of neither empty nor stepped ranges of pixels."""
        raise NotImplementedError

    def _points(self, channels: range, y: Between, x: Between) -> Tensor:
        """``[n, V']`` at points between two rows and two columns each."""
        raise NotImplementedError


# Lower and upper pixel of each point, int64 [n], and the share of the upper one, float64 [n].
Between = tuple[Tensor, Tensor, Tensor]


def affine_map(weight: Any, bias: Any, channels: int) -> tuple[Tensor, Tensor]:
    """Arguments of :meth:`FeatureArray.map` as float32 tensors; UsageError if they do not fit."""
    weight = torch.as_tensor(weight).detach().to("cpu", torch.float32)
    if weight.ndim == 4 and weight.shape[2:] == (1, 1):
        weight = weight[:, :, 0, 0]
    if weight.ndim != 2 or weight.shape[1] != channels:
        raise UsageError(f"a map of {channels} channels needs weight [n, {channels}], "
                         f"got {list(weight.shape)}")  # fmt: skip
    if bias is None:
        return weight, torch.zeros(len(weight))
    bias = torch.as_tensor(bias).detach().to("cpu", torch.float32)
    if bias.shape != (len(weight),):
        raise UsageError(f"{len(weight)} channels need a bias [{len(weight)}], "
                         f"got {list(bias.shape)}")  # fmt: skip
    return weight, bias


def _three(key: Any) -> tuple[Any, ...]:
    """An index as three, one for each dimension."""
    keys = key if isinstance(key, tuple) else (key,)
    if sum(k is Ellipsis for k in keys) > 1 or len(keys) - (Ellipsis in keys) > 3:
        raise IndexError(f"{len(keys)} indices for a map [V, H, W]")
    if Ellipsis not in keys:
        keys = (*keys, Ellipsis)
    at = keys.index(Ellipsis)
    return (*keys[:at], *[slice(None)] * (4 - len(keys)), *keys[at + 1 :])


def _picked(key: Any, length: int) -> tuple[range, bool]:
    """The indices that one key stands for, and whether its dimension is dropped."""
    if isinstance(key, slice):
        return range(length)[key], False
    if hasattr(key, "__index__") and not isinstance(key, bool | Tensor | np.ndarray):
        index = key.__index__()
        if not -length <= index < length:
            raise IndexError(f"index {index} is out of range for {length}")
        return range(index % length, index % length + 1), True
    raise IndexError(
        f"index {key!r} is not supported: use integers, slices and ..., or f.at() for points"
    )


def _bounds(picked: range) -> tuple[int, int]:
    return min(picked[0], picked[-1]), max(picked[0], picked[-1]) + 1


def _between(coordinate: Tensor, length: int) -> Between:
    inside = (coordinate - 0.5).clamp(0, length - 1)
    lower = inside.floor().long()
    return lower, (lower + 1).clamp(max=length - 1), inside - lower
