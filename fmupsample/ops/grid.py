"""Where output pixels lie on a low-resolution axis, in exact integer arithmetic.

Pixel ``P`` of an axis with ``N`` output pixels has its centre at LR coordinate
``(P + 1/2) n / N - 1/2`` on an axis with ``n`` cells (``align_corners=False``). Written over the
common denominator ``2N`` this is an integer, so floor and fraction are exact at every ratio; a
float32 floor is off by a whole cell at some non-integer ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, wraps
from operator import index
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_P, _R = ParamSpec("_P"), TypeVar("_R")


def table(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Remember the last 256 results, but for code that is compiled or exported.

    There the function becomes part of the graph, in which sizes may be symbols; it must not look at
    the numbers in its tensors.
    """
    remembered = lru_cache(maxsize=256)(function)

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        traced = torch.compiler.is_compiling() or any(isinstance(n, torch.SymInt) for n in args)
        if traced:
            return function(*args, **kwargs)
        return remembered(*args, **kwargs)

    return call


def constants(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Remember the last 256 results, which compiled code takes as constants.

    The function may look at the numbers in its tensors. Code is compiled once for each of the sizes
    among its arguments.
    """
    remembered = lru_cache(maxsize=256)(function)

    @torch.compiler.assume_constant_result
    def constant(*args: _P.args, **kwargs: _P.kwargs) -> tuple[_R]:
        return (remembered(*args, **kwargs),)  # two tensors would be taken for the same constant

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        # index() of a size that may vary makes it one that is known.
        return constant(*(n if isinstance(n, float) else index(n) for n in args), **kwargs)[0]

    return call


@dataclass(frozen=True, eq=False)
class AxisPlan:
    """How the ``N`` output pixels of one axis read the ``n`` cells of the LR axis.

    Pixels are numbered in *groups*: maximal runs that share their base cell, and with it all the
    cells they read. ``slots`` is the length of the longest group; every group is laid out on that
    many slots, so that a group is one matrix of a batched product.

    Attributes:
        cells: n, the LR size.
        pixels: N, the output size, >= n.
        base: int64 ``[N]``, the first LR cell of a pixel before any offset; may be -1.
        fraction: float64 ``[N]`` in [0, 1), the share of cell ``base + 1``; zeros for integer
            neighbours.
    """

    cells: int
    pixels: int
    base: Tensor
    fraction: Tensor

    @cached_property
    def first(self) -> int:
        """Base cell of the first group; group ``g`` has base ``first + g``."""
        return int(self.base[0])

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First pixel of each group, and N at the end: ``groups + 1`` numbers."""
        counts = self._counts
        return (*(torch.cumsum(counts, 0) - counts).tolist(), self.pixels)

    @cached_property
    def slots(self) -> int:
        """Slots per group."""
        return int(self._counts.max())

    @property
    def _counts(self) -> Tensor:
        return torch.bincount(self.base - self.base[0])

    @property
    def groups(self) -> int:
        return len(self.starts) - 1

    def part(self, first: int, last: int) -> AxisPlan:
        """The plan of pixels ``first .. last`` alone, on the same cells."""
        base = self.base[first:last]
        return AxisPlan(self.cells, len(base), base, self.fraction[first:last])

    def runs(self, g0: int, g1: int) -> list[tuple[int, int, int]]:
        """The groups ``g0 .. g1`` as runs of equally long ones: ``(first, last + 1, length)``."""
        found: list[tuple[int, int, int]] = []
        for g in range(g0, g1):
            length = self.starts[g + 1] - self.starts[g]
            if found and found[-1][2] == length:
                found[-1] = (found[-1][0], g + 1, length)
            else:
                found.append((g, g + 1, length))
        return found

    def slots_of_pixels(self, g0: int, g1: int) -> Tensor:
        """int64: where the pixels of groups ``g0 .. g1`` lie among those groups' slots."""
        pixels = torch.arange(self.starts[g0], self.starts[g1])
        group = self.base[pixels] - self.first
        return (group - g0) * self.slots + pixels - torch.tensor(self.starts)[group]


@table
def plan_axis(cells: int, pixels: int, fractional: bool) -> AxisPlan:
    """Plan an axis for fractional neighbours (bilinear samples) or integer ones (whole cells)."""
    numerator = _numerator(torch.arange(pixels, dtype=torch.int64), cells, pixels, fractional)
    base = numerator // (2 * pixels)
    remainder = numerator - base * (2 * pixels)
    fraction = remainder.double() / (2 * pixels) if fractional else torch.zeros(pixels).double()
    return AxisPlan(cells, pixels, base, fraction)


def base_cells(cells: int, pixels: int, fractional: bool) -> Tensor:
    """int64 ``[N]``: :attr:`AxisPlan.base`, in compiled code too."""
    if torch.compiler.is_compiling():  # which cannot make objects of tables
        pixel = torch.arange(pixels, dtype=torch.int64)
        return _numerator(pixel, cells, pixels, fractional) // (2 * pixels)
    return plan_axis(cells, pixels, fractional).base


def base_cell(pixel: int, cells: int, pixels: int, fractional: bool) -> int:
    """:func:`base_cells` of one pixel."""
    return _numerator(pixel, cells, pixels, fractional) // (2 * pixels)


def _numerator(pixel, cells: int, pixels: int, fractional: bool):
    """The LR coordinate of a pixel's centre, plus 1/2 for integer neighbours, times ``2N``."""
    return (2 * pixel + 1) * cells - (pixels if fractional else 0)


@table
def neighbour_inside(cells: int, pixels: int, offset: int) -> Tensor:
    """Bool ``[N]``: does the neighbour ``offset`` LR cells away lie inside the picture?

    The neighbour's centre, ``P + 1/2 + offset N / n`` in output pixels, must fall in ``(0, N)``.
    """
    centre = (2 * torch.arange(pixels, dtype=torch.int64) + 1) * cells + 2 * offset * pixels
    return (centre > 0) & (centre < 2 * pixels * cells)


@table
def cell_inside(cells: int, pixels: int, offset: int) -> Tensor:
    """Bool ``[N]``: does the cell ``offset`` cells from the one that holds a pixel exist?"""
    cell = base_cells(cells, pixels, False) + offset
    return (cell >= 0) & (cell < cells)


@table
def cell_distance(cells: int, pixels: int, offset: int) -> Tensor:
    """float64 ``[N]``: from a pixel's centre to that of the cell ``offset`` cells from its own.

    In LR cells; positive where the cell's centre has the larger coordinate.
    """
    centre = (torch.arange(pixels, dtype=torch.float64) + 0.5) * cells / pixels - 0.5
    return base_cells(cells, pixels, False) + offset - centre


@table
def squared_distance(cells: int, pixels: int, offset: int) -> Tensor:
    """float64 ``[N]``: :func:`cell_distance`, squared."""
    return cell_distance(cells, pixels, offset).square()


@table
def interpolation_matrix(cells: int, pixels: int, padding: int = 0) -> Tensor:
    """Bilinear interpolation as a float64 matrix ``U`` ``[N, n]``, rows summing to 1.

    With ``padding`` p the matrix is ``[N, n + 2p]`` and acts on an axis replicate-padded by p
    cells; with p >= 1 no row needs clamping.
    """
    if torch.compiler.is_compiling():
        pixel = torch.arange(pixels, dtype=torch.float64)
        place = (pixel + 0.5) * cells / pixels - 0.5 + padding
        last = cells + 2 * padding - 1
        apart = place.clamp(0, last)[:, None] - torch.arange(last + 1, dtype=torch.float64)
        return (1 - apart.abs()).clamp_min(0)
    whole = torch.zeros(pixels, cells + 2 * padding, dtype=torch.float64)
    read, matrix = interpolation_part(cells, pixels, torch.arange(pixels), padding)
    whole[:, read] = matrix
    return whole


def interpolation_part(
    cells: int, pixels: int, wanted: Tensor, padding: int = 0
) -> tuple[slice, Tensor]:
    """Some rows of :func:`interpolation_matrix`, without the columns that are 0 in all of them.

    Args:
        wanted: int64, which output pixels, ascending.

    Returns:
        The cells of the (padded) axis that these pixels read, and the matrix that acts on them.
    """
    if torch.compiler.is_compiling():
        return slice(0, cells + 2 * padding), interpolation_matrix(cells, pixels, padding)[wanted]
    plan, last = plan_axis(cells, pixels, True), cells + 2 * padding - 1
    low, high = ((plan.base[wanted] + padding + i).clamp(0, last) for i in (0, 1))
    first, share = int(low[0]), plan.fraction[wanted]
    matrix = torch.zeros(len(wanted), int(high[-1]) + 1 - first, dtype=torch.float64)
    rows = torch.arange(len(wanted))
    matrix.index_put_((rows, low - first), 1 - share, accumulate=True)
    matrix.index_put_((rows, high - first), share, accumulate=True)
    return slice(first, first + matrix.shape[1]), matrix


def cell_shares(cells: int, pixels: int, wanted: slice, region: slice) -> Tensor:
    """The matrix that takes means over cells, float64 ``[wanted cells, pixels of the region]``.

    A cell's pixels are those that ``adaptive_avg_pool2d`` gives it: all that it touches.
    """
    cell = torch.arange(wanted.start, wanted.stop)[:, None]
    pixel = torch.arange(region.start, region.stop)
    first, last = cell * pixels // cells, -(-(cell + 1) * pixels // cells)
    return ((pixel >= first) & (pixel < last)) / (last - first).double()
