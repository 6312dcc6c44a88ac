"""A backbone that sees every image in several shifted views, and so has a finer grid.

A patch says one thing about ``s x s`` pixels. Shift the image by a part of a patch, and the patches
fall between the old ones: n x n views give n x n times as many cells, each the backbone's own
answer for a patch around it. Where the other ways to finer features enlarge the image, this one
leaves it at the scale that the backbone knows.

**Geometry.** Along an axis, cell ``i`` of the finer grid is centred at ``(i + 1/2) s / n`` pixels.
Patch ``j`` of a view shifted by ``o`` is centred at ``(j + 1/2) s + o``, so view ``a`` of n needs
``o = (2a + 1 - n) s / 2n``: -4 and +4 for two views of 16 pixels, but -3.5 and +3.5 for 14. Images
are shifted by whole pixels (an interpolated image is a blurred one), by the nearest: -4 and +3. The
remainder, at most half a pixel, is known exactly, and is taken back on the features: each moves
along the straight line to its neighbour by as much as its centre is off, 1/14 of the way for 14
pixels. What is linear in the position is exact, at the borders as well.

**Two views** are shifted along the diagonal and give a quincunx: the cells (even, even) and (odd,
odd) of the finer grid, each view moved by itself. A cell between them is the mean of the two beside
it and the two above and below; at the border of the two along it; in a corner, of the two that
touch it.

Beyond its border an image goes on as its outermost pixels.
"""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.backbones.backbone import Backbone
from fmupsample.errors import BackboneError, UsageError

# How many views there may be, and how many cells of the finer grid a patch then has along an axis.
VIEWS = {1: 1, 2: 2, 4: 2, 9: 3}
# Views of more pixels than these go through the backbone one after another.
_PIXELS_AT_ONCE = 2**20

_COPIED = (
    "name",
    "architecture",
    "channels",
    "size_multiple",
    "fixed_size",
    "default_image_size",
    "mean",
    "std",
    "layer",
)


class ViewedBackbone(Backbone):
    """``[B, 3, H, W]`` images -> ``[B, C, n h, n w]`` features, from shifted views of each image.

    It has every attribute of a :class:`.Backbone`, with the values of the finer grid, and stands
    wherever a backbone can.

    Attributes:
        views: how many there are; every image takes as many passes.
        single: the backbone that sees one view.
        stride: image pixels per cell of the finer grid; a float where it is not whole.
        reach: by how many pixels views are shifted at most, (y, x).
        fingerprint: of the weights and the number of views.
    """

    def __init__(self, backbone: Backbone, views: int) -> None:
        """Show every image to ``backbone`` in ``views`` views.

        Raises:
            UsageError: not 2, 4 or 9 views.
            BackboneError: patches too small to be divided.
        """
        nn.Module.__init__(self)
        self.single = backbone
        self.views = check_views(views)
        self.cells = count = VIEWS[views]  # of a patch, along an axis
        for name in _COPIED:
            setattr(self, name, getattr(backbone, name))
        self.prefix_tokens = getattr(backbone, "prefix_tokens", 0)
        self.card = getattr(backbone, "card", {})
        if min(backbone.stride) < count:
            raise BackboneError(
                f"{self.name} has {backbone.stride[0]}x{backbone.stride[1]} pixels a cell: too few "
                f"for {views} views"
            )
        self.stride = tuple(_number(Fraction(s, count)) for s in backbone.stride)
        self._axes = tuple(axis_shifts(s, count) for s in backbone.stride)
        self.reach = tuple(max(map(abs, shifts)) for shifts, _ in self._axes)
        pairs = product(range(count), repeat=2)
        self._places = [(a, b) for a, b in pairs if views != 2 or a == b]
        told = f"{backbone.fingerprint} {views} views"
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()[:12]

    @property
    def model(self) -> Any:
        """The model of the single view."""
        return self.single.model

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        height, width = self.single.grid(size)
        return height * self.cells, width * self.cells

    def forward(
        self, images: Tensor, *, surrounded: bool = False, return_global: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Features ``[B, C, n h, n w]`` of ``images`` ``[B, 3, H, W]``.

        Args:
            surrounded: ``images`` are parts of larger images and hold ``reach`` more pixels on
                every side. Otherwise the views repeat the border of the image.
            return_global: give ``(features, vectors)``, with the mean ``[B, D]`` of the vectors
                that the single backbone has of the views.

        Raises:
            ShapeError: as of :meth:`.Backbone.forward`.
        """
        down, across = self.reach
        if surrounded:
            padded = images
            images = images[..., down : images.shape[-2] - down, across : images.shape[-1] - across]
            self._check(images)
        else:
            images = self._taken(images)
            padded = F.pad(images, (across, across, down, down), mode="replicate")
        vectors: list[Tensor] | None = [] if return_global else None
        features = self._interleaved(padded, images.shape, vectors)
        if self.views == 2:
            _fill_quincunx(features)
        else:
            features = self._moved(features, slice(None))
        return features if vectors is None else (features, torch.stack(vectors).mean(0))

    def _interleaved(
        self, padded: Tensor, shape: torch.Size, vectors: list[Tensor] | None
    ) -> Tensor:
        """Put the features of each view at their places; cells that no view sees are not set.

        Args:
            vectors: is given the views' own, ``[B, D]`` each.
        """
        batch, _, height, width = shape
        count, finer = self.cells, None
        at_once = max(1, _PIXELS_AT_ONCE // (batch * height * width))
        for first in range(0, len(self._places), at_once):
            places = self._places[first : first + at_once]
            shown = [self._view(padded, place, (height, width)) for place in places]
            if vectors is None:
                found = self.single(torch.cat(shown))
            else:
                found, pooled = self.single(torch.cat(shown), return_global=True)
                vectors += pooled.split(batch)
            if finer is None:
                kind = torch.float32 if found.element_size() < 4 else found.dtype
                channels, h, w = found.shape[1:]
                finer = found.new_empty(batch, channels, h, count, w, count, dtype=kind)
            for (a, b), own in zip(places, found.split(batch), strict=True):
                if self.views == 2:  # what fills the gaps needs its neighbours in their places
                    own = self._moved(own.to(kind), slice(a, a + 1))
                finer[:, :, :, a, :, b] = own
        return finer.flatten(4).flatten(2, 3)

    def _moved(self, features: Tensor, seen: slice) -> Tensor:
        """Move interleaved features of the views ``seen`` to the centres of their cells."""
        for dim, stride, axis in zip((2, 3), self.single.stride, self._axes, strict=True):
            features = _move_to_centres(features, dim, stride, *(part[seen] for part in axis))
        return features

    def _view(self, padded: Tensor, place: tuple[int, int], size: tuple[int, int]) -> Tensor:
        top, left = (
            reach + shifts[n]
            for reach, (shifts, _), n in zip(self.reach, self._axes, place, strict=True)
        )
        return padded[..., top : top + size[0], left : left + size[1]]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, views={self.views}"


def with_views(backbone: Backbone, views: int) -> Backbone:
    """Return ``backbone`` for one view, else a backbone that shows it ``views`` views.

    Raises:
        UsageError, BackboneError: as of :class:`ViewedBackbone`.
    """
    return backbone if check_views(views) == 1 else ViewedBackbone(backbone, views)


def check_views(views: int) -> int:
    """Return ``views``, or raise a UsageError where this number of views is not possible."""
    if views not in VIEWS:
        raise UsageError(f"{views} views are not possible: use {', '.join(map(str, VIEWS))}")
    return int(views)


def title(backbone: Backbone) -> str:
    """Return the backbone's name, and the number of its views where it has several."""
    views = getattr(backbone, "views", 1)
    return backbone.name if views == 1 else f"{backbone.name}, {views} views"


def axis_shifts(stride: int, count: int) -> tuple[tuple[int, ...], tuple[Fraction, ...]]:
    """Return the shifts of the ``count`` views of an axis and their remainders, in pixels.

    A shift is a whole number. Its remainder, at most half a pixel, is what it lacks to the exact
    shift, so ``shift + remainder`` is exact.
    """
    exact = [Fraction((2 * a + 1 - count) * stride, 2 * count) for a in range(count)]
    whole = [math.ceil(shift - Fraction(1, 2)) for shift in exact]
    return tuple(whole), tuple(e - w for e, w in zip(exact, whole, strict=True))


def _move_to_centres(
    x: Tensor, dim: int, stride: int, shifts: tuple[int, ...], rests: tuple[Fraction, ...]
) -> Tensor:
    """Move interleaved features along ``dim`` from where they were seen to their cells' centres.

    Each value moves along the straight line to its neighbour on that side. At an end without such
    a neighbour it moves along the line through the neighbour on the other side.
    """
    length, count = x.shape[dim], len(shifts)
    if not any(rests) or length == 1:
        return x
    seen = torch.tensor([j * stride + shifts[a] for j in range(length // count)
                         for a in range(count)], dtype=torch.float64)  # fmt: skip
    rest = torch.tensor([float(r) for r in rests], dtype=torch.float64).repeat(length // count)
    number = torch.arange(length)
    side = torch.where(rest < 0, number - 1, number).clamp(0, length - 2)
    share = rest / seen.diff()[side]
    shape = [-1 if d == dim else 1 for d in range(x.ndim)]
    steps = x.diff(dim=dim).index_select(dim, side.to(x.device))
    return x + steps.mul_(share.to(x).view(shape))


def _fill_quincunx(x: Tensor) -> None:
    """Set the cells of ``[B, C, 2h, 2w]`` that no view sees to the mean of their neighbours."""
    even, odd = x[:, :, ::2, ::2], x[:, :, 1::2, 1::2]
    # An (even, odd) cell has even cells left and right and odd cells above and below; an
    # (odd, even) cell has odd cells left and right and even cells above and below.
    x[:, :, ::2, 1::2] = _mean_of_pairs(even, _next(even, 3), _previous(odd, 2), odd, 3, 2)
    x[:, :, 1::2, ::2] = _mean_of_pairs(even, _next(even, 2), _previous(odd, 3), odd, 2, 3)


def _mean_of_pairs(
    before: Tensor, after: Tensor, above: Tensor, below: Tensor, last: int, first: int
) -> Tensor:
    """Return the mean of both pairs.

    At the end of dimension ``last`` there is no ``after``, at the beginning of ``first`` there is
    no ``above``: there the mean is that of the other pair, and in the corner, where both are
    missing, that of the remaining two.
    """
    one, other = (before + after) / 2, (above + below) / 2
    found = (one + other) / 2
    end = (slice(None),) * last + (-1,)
    begin = (slice(None),) * first + (0,)
    found[end], found[begin] = other[end], one[begin]
    corner = [slice(None)] * 4
    corner[last], corner[first] = -1, 0
    found[tuple(corner)] = ((before + below) / 2)[tuple(corner)]
    return found


def _next(x: Tensor, dim: int) -> Tensor:
    """Return each cell's successor along ``dim``; the last cell has itself."""
    return torch.cat([x.narrow(dim, 1, x.shape[dim] - 1), x.narrow(dim, -1, 1)], dim)


def _previous(x: Tensor, dim: int) -> Tensor:
    """Return each cell's predecessor along ``dim``; the first cell has itself."""
    return torch.cat([x.narrow(dim, 0, 1), x.narrow(dim, 0, x.shape[dim] - 1)], dim)


def _number(value: Fraction) -> int | float:
    return value.numerator if value.denominator == 1 else float(value)
