"""A 3x3 convolution of bands of rows with half of the multiply-adds: Winograd's minimal filtering.

Down the rows it is F(4, 3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks"
(2016): six products make four outputs of a filter of three taps, instead of twelve. Across, the
taps are products of shifted views. Exact up to rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 4  # outputs of one transform
_TAPS = 6

# What three taps become, at the points 0, 1, -1, 2, -2 and infinity.
_FILTER = [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
]


class Convolution3x3:
    """The convolution with a weight ``[O, I, 3, 3]``.

    Left and right of the map there are zeros, or, ``mirrored``, the columns beside the outermost.
    """

    def __init__(self, weight: Tensor, *, mirrored: bool = False) -> None:
        transform = torch.tensor(_FILTER, dtype=torch.float64)
        transformed = torch.einsum("ty,oiyx->xtoi", transform, weight.detach().double().cpu())
        self._weight = transformed.to(weight).contiguous()  # [3, 6, O, I]
        self._mirrored = mirrored

    def __call__(self, part: Tensor) -> Tensor:
        """``[I, rows + 2, W]`` with the rows above and below -> ``[rows, O, W]``."""
        rows, width = part.shape[1] - 2, part.shape[2]
        blocks = -(-rows // ROWS)
        missing = blocks * ROWS - rows
        padded = F.pad(part.transpose(0, 1), (1, 1, 0, 0, 0, missing))  # [rows + 2, I, W + 2]
        if self._mirrored:
            inside = min(width, 2)  # a single column is repeated
            padded[..., 0], padded[..., -1] = padded[..., inside], padded[..., -1 - inside]
        out = part.new_empty(blocks * ROWS, self._weight.shape[2], width)
        inputs = torch.empty_like(padded[:_TAPS])
        products = part.new_empty(_TAPS, *out.shape[1:])
        for first in range(0, blocks * ROWS, ROWS):
            _transform_input(padded[first : first + _TAPS], inputs)
            for dx, weight in enumerate(self._weight):
                shifted = inputs[:, :, dx : dx + width]
                if dx == 0:
                    torch.bmm(weight, shifted, out=products)
                else:
                    products.baddbmm_(weight, shifted)
            _transform_output(products, out[first : first + ROWS])
        return out[:rows]


def _transform_input(rows: Tensor, out: Tensor) -> None:
    """Six rows -> what six products take."""
    d0, d1, d2, d3, d4, d5 = rows
    even, odd = d4.sub(d2, alpha=4), d3.sub(d1, alpha=4)
    torch.add(even, odd, out=out[1])
    torch.sub(even, odd, out=out[2])
    torch.sub(d4, d2, out=even)
    torch.sub(d3, d1, out=odd)
    torch.add(even, odd, alpha=2, out=out[3])
    torch.sub(even, odd, alpha=2, out=out[4])
    torch.sub(d4, d2, alpha=5, out=out[0]).add_(d0, alpha=4)
    torch.sub(d5, d3, alpha=5, out=out[5]).add_(d1, alpha=4)


def _transform_output(products: Tensor, out: Tensor) -> None:
    """Six products -> four rows."""
    p0, p1, p2, p3, p4, p5 = products
    sums, differences = p1 + p2, p1 - p2
    far_sums, far_differences = p3 + p4, p3 - p4
    torch.add(p0, sums, out=out[0]).add_(far_sums)
    torch.add(differences, far_differences, alpha=2, out=out[1])
    torch.add(sums, far_sums, alpha=4, out=out[2])
    torch.add(differences, far_differences, alpha=8, out=out[3]).add_(p5)
