"""Features of pictures that are too large for a backbone at once: overlapping windows, blended.

A backbone is not local: attention spans its input, and what it says of a cell depends a little on
all that it sees. So, unlike the upsampler's, these windows are not exact: the picture is shown in
pieces, and where they overlap their features pass smoothly from one to the next.

Blending removes edges, but a window that sees only fur still calls it something else than one that
sees the animal. So the coarse part of the features, their means over areas of an eighth of a
window, is taken from one look at the whole picture made small; the windows give the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fmupsample.layers.parts import InParts

# Of a window's side, at least, shared with the next one.
_OVERLAP = 0.25
# Areas along a window's side whose means come from the whole picture.
_AREAS = 8
# Worked on at a time, where all would take too much memory.
_OVERVIEW_ROWS, _CHANNELS = 256, 16


def starts(length: int, window: int, multiple: int) -> list[int]:
    """Where windows of one axis begin: multiples of ``multiple``, evenly spread, the last at the
    end.

    Args:
        length, window: multiples of ``multiple``.
    """
    if window >= length:
        return [0]
    overlap = multiple * -int(-window * _OVERLAP // multiple)
    count = -(-(length - overlap) // max(multiple, window - overlap))
    last = (length - window) // multiple
    return [multiple * ((2 * last * i + count - 1) // (2 * (count - 1))) for i in range(count)]


def ramp(cells: int, before: int, after: int) -> Tensor:
    """Weights ``[cells]`` of a window: 1, and falling towards its ends over so many cells.

    Half a cosine, so that two windows of equal overlap sum to 1; an end where nothing overlaps
    (0 cells: the picture's border) keeps the weight 1.
    """

    def rise(n: int) -> Tensor:
        return 0.5 - 0.5 * torch.cos((torch.arange(n, dtype=torch.float64) + 0.5) / n * torch.pi)

    weights = torch.ones(cells, dtype=torch.float64)
    if before:
        weights[:before] *= rise(before)
    if after:
        weights[cells - after :] *= rise(after).flip(0)
    return weights


def window_side(size: tuple[int, int], wanted: int, multiple: tuple[int, int]) -> tuple[int, int]:
    """The largest window on the grid with sides of at most ``wanted``, and of the picture."""
    return tuple(min(n, max(1, wanted // m) * m) for n, m in zip(size, multiple, strict=True))


def features_in_windows(
    run: Callable[[Tensor], Tensor],
    image: Tensor | InParts,
    window: tuple[int, int],
    multiple: tuple[int, int],
    batch: int = 1,
    around: tuple[int, int] = (0, 0),
) -> Tensor:
    """Features ``[C, h, w]`` of a picture ``[3, H, W]``, float32.

    Args:
        run: pictures ``[B, 3, H', W']`` -> features ``[B, C, h', w']``, of one ratio at all sizes.
        window: ``(H', W')``, multiples of ``multiple``.
        multiple: of the backbone's sizes.
        batch: windows at a time.
        around: by how many more pixels, down and across, windows are cut on every side for ``run``,
            which gives the features of the window alone; the picture's own border is repeated.
    """
    size = image.shape[1:]
    rows, columns = (starts(n, s, m) for n, s, m in zip(size, window, multiple, strict=True))
    corners = [(y, x) for y in rows for x in columns]
    total = weight = None
    for some, features in _batches(run, image, corners, window, batch, around):
        grid = features.shape[2:]
        if total is None:
            cells = tuple(n * g // s for n, g, s in zip(size, grid, window, strict=True))
            total = features.new_zeros(features.shape[1], *cells, dtype=torch.float32)
            weight = total.new_zeros(cells)
        for corner, part in zip(some, features, strict=True):
            down, across = (
                _weights(at, all_, n, s)
                for at, all_, n, s in zip(corner, (rows, columns), grid, window, strict=True)
            )
            blend = (down[:, None] * across).to(total)
            first = (at * n // s for at, n, s in zip(corner, grid, window, strict=True))
            place = tuple(slice(i, i + n) for i, n in zip(first, grid, strict=True))
            total[(slice(None), *place)] += part.float() * blend
            weight[place] += blend
    return total.div_(weight)


def overview_size(
    size: tuple[int, int], window: tuple[int, int], multiple: tuple[int, int]
) -> tuple[int, int]:
    """``(H, W)`` at which the whole picture fits into a window, nearly in its own shape."""
    scale = min(w / n for w, n in zip(window, size, strict=True))
    return tuple(
        min(w, max(1, round(n * scale / m)) * m)
        for n, w, m in zip(size, window, multiple, strict=True)
    )


def overview_of(image: Tensor | InParts, size: tuple[int, int]) -> Tensor:
    """A picture ``[3, H, W]`` made small, ``[3, H', W']``: bicubic, antialiased.

    Across first, some rows at a time: so the whole picture need not be there.
    """

    def resized(some: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(some[None], size, mode="bicubic", align_corners=False, antialias=True)[
            0
        ]

    rows = range(0, image.shape[1], _OVERVIEW_ROWS)
    parts = (image[:, y : y + _OVERVIEW_ROWS] for y in rows)
    return resized(torch.cat([resized(p, (p.shape[1], size[1])) for p in parts], 1), size)


def with_coarse_part(
    features: Tensor, overview: Tensor, size: tuple[int, int], window: tuple[int, int]
) -> Tensor:
    """``features`` with the coarse part of ``overview`` in place of their own, ``[C, h, w]``.

    In the memory of ``features``, if they are float32.

    Args:
        features: ``[C, h, w]`` of a picture of ``size`` pixels, by windows of ``window`` pixels.
        overview: ``[C, h', w']`` of the whole picture.
    """
    areas = tuple(
        min(round(n * _AREAS / w) or 1, *cells)
        for n, w, *cells in zip(size, window, features.shape[1:], overview.shape[1:], strict=True)
    )

    def coarse(x: Tensor) -> Tensor:
        means = F.adaptive_avg_pool2d(x.float()[None], areas)
        return F.interpolate(means, features.shape[1:], mode="bicubic", align_corners=False)[0]

    # The features of a large picture are large: some channels at a time, in place.
    features = features.float()
    for some, few in zip(features.split(_CHANNELS), overview.split(_CHANNELS), strict=True):
        difference = coarse(few)
        difference -= coarse(some)
        some += difference
    return features


def _batches(
    run: Callable[[Tensor], Tensor],
    image: Tensor | InParts,
    corners: list[tuple[int, int]],
    window: tuple[int, int],
    batch: int,
    around: tuple[int, int],
) -> Iterator[tuple[list[tuple[int, int]], Tensor]]:
    for i in range(0, len(corners), batch):
        some = corners[i : i + batch]
        yield some, run(torch.stack([_cut(image, corner, window, around) for corner in some]))


def _cut(
    image: Tensor | InParts,
    corner: tuple[int, int],
    window: tuple[int, int],
    around: tuple[int, int],
) -> Tensor:
    """A window and what is around it; beyond the picture its border goes on."""
    part, lacking = [], []
    for at, side, more, length in zip(corner, window, around, image.shape[1:], strict=True):
        start, stop = at - more, at + side + more
        part.append(slice(max(0, start), min(length, stop)))
        lacking.append((max(0, -start), max(0, stop - length)))
    found = image[(slice(None), *part)]
    if any(map(any, lacking)):
        found = F.pad(found[None], (*lacking[1], *lacking[0]), mode="replicate")[0]
    return found


def _weights(at: int, all_starts: list[int], cells: int, side: int) -> Tensor:
    """The ramp of the window of ``side`` pixels that begins at pixel ``at``."""
    i = all_starts.index(at)
    before = all_starts[i - 1] + side - at if i else 0
    after = at + side - all_starts[i + 1] if i + 1 < len(all_starts) else 0
    return ramp(cells, *(min(n * cells // side, cells) for n in (before, after)))
