"""The compact format: low-resolution features and kernel weights, which determine the map.

A safetensors file with two tensors and string metadata:

* ``values``, F16, BF16 or F32 ``[V, h, w]``: features (or their PCA scores) of the whole canvas;
* ``weights``, U8, F16 or F32 ``[K*K, H, W]``: of each pixel of the picture without its padding.
  Divided by their sum over the neighbours they are the kernel weights: for U8 the largest weight of
  a pixel is 255. Absent for K = 1, where every weight is 1.

The metadata holds ``format`` (this version), ``layout`` (JSON of :class:`Layout`), and the facts
about the picture that every feature file holds.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import prod

import torch
from torch import Tensor

FORMAT = "fmupsample-compact/1"
WEIGHT_BITS = {8: torch.uint8, 16: torch.float16, 32: torch.float32}

_NEIGHBOURS = ("fine", "coarse")
# No file of ours comes near; a damaged header shall not make anyone plan an axis of 10^12 pixels.
_MAX_SIDE = 1 << 20


@dataclass(frozen=True)
class Layout:
    """How the two tensors make a map.

    Attributes:
        neighbours: ``"fine"`` (bilinear samples) or ``"coarse"`` (whole cells).
        kernel_size: K.
        full: ``(H, W)`` of a map of the whole canvas, padding included.
        crop: ``(H, W)`` of the part at its top left that is the picture; that of ``weights``.
        size: ``(H, W)`` of the result: the crop, enlarged bilinearly or averaged if they differ.
    """

    neighbours: str
    kernel_size: int
    full: tuple[int, int]
    crop: tuple[int, int]
    size: tuple[int, int]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """ValueError, KeyError or TypeError for anything that is not a sound layout."""
        data = json.loads(text)
        sizes = {k: (int(data[k][0]), int(data[k][1])) for k in ("full", "crop", "size")}
        layout = cls(str(data["neighbours"]), int(data["kernel_size"]), **sizes)
        if layout.neighbours not in _NEIGHBOURS:
            raise ValueError(f"unknown neighbours {layout.neighbours!r}")
        if not 1 <= layout.kernel_size <= 99 or layout.kernel_size % 2 == 0:
            raise ValueError(f"impossible kernel size {layout.kernel_size}")
        if not all(1 <= n <= _MAX_SIDE for n in (*layout.full, *layout.crop, *layout.size)):
            raise ValueError("impossible sizes")
        if any(c > f for c, f in zip(layout.crop, layout.full, strict=True)):
            raise ValueError("the crop is larger than the map")
        return layout

    @property
    def weights_shape(self) -> tuple[int, int, int] | None:
        """Of the tensor ``weights``; ``None`` where there is none."""
        return None if self.kernel_size == 1 else (self.kernel_size**2, *self.crop)


def compact_bytes(
    values: tuple[int, ...], value_bytes: int, layout: Layout, weight_bits: int
) -> int:
    """About how many bytes a file takes: the numbers, and 2 kB for the header."""
    weights = prod(layout.weights_shape or (0,)) * weight_bits // 8
    return prod(values) * value_bytes + weights + 2048


def encode_weights(weights: Tensor, bits: int) -> Tensor:
    """Kernel weights ``[N, ...]``, not negative, summing to 1 over N, as they are stored.

    With 8 bits each pixel has a scale of its own (its largest weight becomes 255), which loses at
    most ``(N - 1) / (511 - N)`` of the weights (the sum of the differences) and typically a tenth
    of that.
    """
    if bits != 8:
        return weights.to(WEIGHT_BITS[bits])
    largest = weights.amax(0, keepdim=True)
    return (weights * (255 / largest)).round_().to(torch.uint8)


def decode_weights(stored: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What :func:`encode_weights` made -> weights that sum to 1 again, so that maps of values
    and reassembly still commute."""
    weights = stored.to(dtype)
    return weights / weights.sum(0, keepdim=True)
