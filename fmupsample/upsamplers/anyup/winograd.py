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

# The transforms of six input rows, three taps and six products, at the points 0, 1, -1, 2, -2 and
# infinity.
_INPUT = [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]
_FILTER = [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
]
_OUTPUT = [
    [1, 1, 1, 1, 1, 0],
    [0, 1, -1, 2, -2, 0],
    [0, 1, 1, 4, 4, 0],
    [0, 1, -1, 8, -8, 1],
]


class Convolution3x3:
    """The convolution with a weight ``[O, I, 3, 3]``."""

    def __init__(self, weight: Tensor) -> None:
        self._input, self._output = (
            torch.tensor(matrix, dtype=weight.dtype, device=weight.device)
            for matrix in (_INPUT, _OUTPUT)
        )
        transform = torch.tensor(_FILTER, dtype=torch.float64)
        transformed = torch.einsum("ty,oiyx->xtoi", transform, weight.detach().double().cpu())
        self._weight = transformed.to(weight).contiguous()  # [3, 6, O, I]

    def __call__(self, part: Tensor) -> Tensor:
        """``[I, rows + 2, W]`` with the rows above and below -> ``[rows, O, W]``.

        Left and right of the map there is nothing: zeros.
        """
        inputs, rows, width = part.shape[0], part.shape[1] - 2, part.shape[2]
        blocks = -(-rows // ROWS)
        missing = blocks * ROWS - rows
        padded = F.pad(part.transpose(0, 1), (1, 1, 0, 0, 0, missing))  # [rows + 2, I, W + 2]
        out = part.new_empty(blocks * ROWS, self._weight.shape[2], width)
        products = part.new_empty(_TAPS, self._weight.shape[2], width)
        for first in range(0, blocks * ROWS, ROWS):
            six = padded[first : first + _TAPS].flatten(1)
            six = (self._input @ six).view(_TAPS, inputs, width + 2)
            for dx, weight in enumerate(self._weight):
                shifted = six[:, :, dx : dx + width]
                if dx == 0:
                    torch.bmm(weight, shifted, out=products)
                else:
                    products.baddbmm_(weight, shifted)
            torch.mm(self._output, products.flatten(1), out=out[first : first + ROWS].flatten(1))
        return out[:rows]
