"""Max unpooling: maxima go back to where they came from.

Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks" (ECCV 2014); Badrinarayanan
et al., "SegNet" (TPAMI 2017).
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from decoders.indexnet import require_size
from fmupsample.errors import ShapeError
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.complexity import Size


class MaxUnpooling(Upsampler):
    """Put ``[B, C, h, w]`` where the maxima of the encoder's 2 x 2 blocks were; 0 elsewhere.

    In an encoder-decoder, call :meth:`downsample` and :meth:`upsample`; ``up(x, guidance)`` finds
    the maxima of the encoder's map ``[B, C, H, W]`` itself. No parameters.
    """

    name: ClassVar[str] = "max-unpooling"
    needs_guidance: ClassVar[bool] = True
    fixed_ratio = 2
    linear_in_value = False  # three of four pixels have no weights at all
    guidance_is_image = False
    uses_ops: ClassVar[bool] = False

    def downsample(self, encoder: Tensor) -> tuple[Tensor, Tensor]:
        """Maxima ``[B, C, ceil(H/2), ceil(W/2)]`` of 2 x 2 blocks, and int64 where they were."""
        return F.max_pool2d(encoder, 2, ceil_mode=True, return_indices=True)

    def upsample(self, x: Tensor, places: Tensor, size: tuple[int, int]) -> Tensor:
        """``[B, C, h, w]`` at the places ``[B, C, h, w]`` of an empty ``[B, C, H, W]``."""
        if x.shape != places.shape:
            raise ShapeError(
                f"{self.name} needs the features and the encoder's maxima alike, got "
                f"{list(x.shape)} and {list(places.shape)}"
            )
        empty = x.new_zeros(*x.shape[:2], size[0] * size[1])
        return empty.scatter(2, places.flatten(2), x.flatten(2)).unflatten(2, size)

    def forward(
        self, x: Tensor, guidance: Tensor | None = None, *, size: tuple[int, int] | None = None
    ) -> Tensor:
        size = self.check(x, guidance, size)
        assert guidance is not None  # checked above: needs_guidance
        require_size(self.name, guidance, size)
        return self.upsample(x, self.downsample(guidance)[1], size)

    def macs(self, channels: int, cells: Size, pixels: Size) -> tuple[int, int]:
        return 0, 0
