"""How large the map of a picture is, and on what size of the canvas it is made."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fmupsample.images.size import Frame

# The guidance shows no more detail than the canvas has, so maps of more pixels than that, and than
# these, are made at this size and enlarged bilinearly.
_DIRECT_PIXELS = 2**21


def map_sizes(
    frame: Frame, grid: tuple[int, int], size: tuple[int, int] | None
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """For a map of the picture: the size to upsample the whole canvas to, its crop, the result.

    With padding, the canvas's size is the one that gives the picture its size, to the nearest
    pixel. A map smaller than the grid (the original pixels of a thumbnail) is upsampled to the
    canvas and averaged down; a huge one is made smaller and enlarged.
    """
    crop = wanted = frame.placed if size is None else size
    limit = max(frame.canvas[0] * frame.canvas[1], _DIRECT_PIXELS)
    if wanted[0] * wanted[1] > limit:
        scale = (limit / (wanted[0] * wanted[1])) ** 0.5
        crop = (max(1, int(wanted[0] * scale)), max(1, int(wanted[1] * scale)))
    down, across = zip(crop, frame.placed, frame.canvas, grid, strict=True)
    full = (_whole(*down), _whole(*across))
    if full[0] < grid[0] or full[1] < grid[1]:
        return frame.canvas, frame.placed, wanted
    return full, crop, wanted


def finish(full: Tensor, crop: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """A map ``[V, H, W]`` of the canvas -> its ``crop``, brought to ``size``."""
    out = full[:, : crop[0], : crop[1]]
    if crop == size:
        return out
    if size[0] >= crop[0] and size[1] >= crop[1]:
        return F.interpolate(out[None], size=size, mode="bilinear", align_corners=False)[0]
    return F.adaptive_avg_pool2d(out, size)


def _whole(wanted: int, placed: int, canvas: int, cells: int) -> int:
    """Length of a map of the canvas in which the picture has length ``wanted``."""
    if placed == canvas:
        return wanted
    length = wanted * canvas / placed
    whole_ratio = max(1, round(length / cells)) * cells
    if round(whole_ratio * placed / canvas) == wanted:
        return whole_ratio  # an exact multiple of the grid, where rounding allows it
    return max(wanted, round(length))
