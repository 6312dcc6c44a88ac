"""IndexNet: where an encoder took its maxima from, learned, guides the decoder.

Lu et al., "Indices Matter: Learning to Index for Deep Image Matting" (ICCV 2019). A small network
looks at each 2 x 2 block of the encoder's map and predicts four indices y. The encoder pools with
their softmax, ``down(e) = sum over the block of softmax(sigmoid(y)) e``; the decoder's features,
nearest-upsampled, are multiplied by ``sigmoid(y)``.

``hin`` (holistic): the indices are the same for all channels. ``m2o`` (depthwise, many to one):
each channel has its own, predicted from all.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.errors import ShapeError, UsageError
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.complexity import Size, per_place
from fmupsample.upsamplers.config import Config
from fmupsample.upsamplers.neighbours import in_cell
from fmupsample.upsamplers.official.filling import fill, renamed, required


@dataclass(frozen=True)
class IndexNetConfig(Config):
    """Shape of the index network."""

    guidance_channels: int | None = None  # of the encoder's map; None: those of the features
    kind: str = "hin"  # "hin" or "m2o"
    nonlinear: bool = True  # two layers instead of one
    context: bool = True  # look at 4 x 4 pixels instead of 2 x 2

    def __post_init__(self) -> None:
        self.require_one_of("kind", ("hin", "m2o"))
        if self.guidance_channels is None:
            object.__setattr__(self, "guidance_channels", self.channels)
        if self.kind == "m2o" and self.guidance_channels != self.channels:
            raise UsageError(
                "IndexNetConfig: m2o has an index for every channel, so the encoder's map must "
                f"have those of the features, {self.channels}, not {self.guidance_channels}"
            )


class IndexNet(Upsampler):
    """Upsample ``[B, C, h, w]`` exactly twice by the indices of an encoder's map.

    In an encoder-decoder, call :meth:`downsample` instead of pooling and :meth:`upsample` with the
    indices it gave; ``up(x, guidance)`` does the second half from the encoder's map. The result is
    the features times numbers in 0..1, not an average of them.
    """

    name: ClassVar[str] = "indexnet"
    needs_guidance: ClassVar[bool] = True
    fixed_ratio = 2
    linear_in_value = False  # the weights do not sum to 1
    guidance_is_image = False
    uses_ops: ClassVar[bool] = False

    def __init__(self, config: IndexNetConfig) -> None:
        super().__init__()
        self.config = config
        blocks = 1 if config.kind == "hin" else 4
        self.blocks = nn.ModuleList(self._block() for _ in range(blocks))

    def _block(self) -> nn.Sequential:
        c = self.config
        channels, holistic = c.guidance_channels, c.kind == "hin"
        size, padding = (4, 1) if c.context else (2, 0)
        out = 4 if holistic else channels
        if not c.nonlinear:
            return nn.Sequential(nn.Conv2d(channels, out, size, 2, padding, bias=False))
        middle = 2 * channels if holistic else channels
        return nn.Sequential(
            nn.Conv2d(channels, middle, size, 2, padding, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU6(),
            nn.Conv2d(middle, out, 1, bias=False),
        )

    def macs(self, channels: int, cells: Size, pixels: Size) -> tuple[int, int]:
        """The index network at LR, and a product per channel at HR."""
        return per_place(self.blocks) * prod(cells), channels * prod(pixels)

    def indices(self, encoder: Tensor) -> tuple[Tensor, Tensor]:
        """For the encoder and for the decoder, each ``[B, 1 or C, H', W']``.

        H' and W' are H and W of the encoder's map made even: odd maps are replicated by a pixel.
        """
        if encoder.shape[1] != self.config.guidance_channels:
            raise ShapeError(
                f"this {self.name} looks at {self.config.guidance_channels} channels of an "
                f"encoder, got {encoder.shape[1]}"
            )
        encoder = made_even(encoder)
        # [B, 1 or C, 4, H'/2, W'/2]: the four pixels of a block, row by row.
        if self.config.kind == "hin":
            predicted = self.blocks[0](encoder)[:, None]
        else:
            predicted = torch.stack([block(encoder) for block in self.blocks], 2)
        gates = predicted.sigmoid()
        return tuple(F.pixel_shuffle(t.flatten(1, 2), 2) for t in (gates.softmax(2), gates))

    def downsample(self, encoder: Tensor) -> tuple[Tensor, Tensor]:
        """Pool ``[B, E, H, W]`` by its indices.

        Returns:
            ``[B, E, ceil(H/2), ceil(W/2)]``, and the decoder's indices ``[B, 1 or E, H, W]``.
        """
        of_encoder, of_decoder = self.indices(encoder)
        pooled = 4 * F.avg_pool2d(made_even(encoder) * of_encoder, 2)
        return pooled, of_decoder[:, :, : encoder.shape[2], : encoder.shape[3]]

    def upsample(self, x: Tensor, indices: Tensor) -> Tensor:
        """``[B, C, h, w]`` by a decoder's indices ``[B, 1 or C, H, W]`` -> ``[B, C, H, W]``."""
        height, width = indices.shape[2:]
        nearest = in_cell(x, (2 * x.shape[2], 2 * x.shape[3]))[:, :, :height, :width]
        return nearest * indices

    def forward(
        self, x: Tensor, guidance: Tensor | None = None, *, size: tuple[int, int] | None = None
    ) -> Tensor:
        size = self.check(x, guidance, size)
        assert guidance is not None  # checked above: needs_guidance
        require_size(self.name, guidance, size)
        if x.shape[1] != self.config.channels:
            raise ShapeError(
                f"this {self.name} was built for {self.config.channels} channels, got {x.shape[1]}"
            )
        of_decoder = self.indices(guidance)[1]
        return self.upsample(x, of_decoder[:, :, : size[0], : size[1]].to(x.dtype))


def made_even(x: Tensor) -> Tensor:
    """``x`` replicated by a row and a column where its sizes are odd."""
    height, width = x.shape[2:]
    if height % 2 == width % 2 == 0:
        return x
    return F.pad(x, (0, width % 2, 0, height % 2), mode="replicate")


def require_size(name: str, encoder: Tensor, size: tuple[int, int]) -> None:
    """Raise a ShapeError unless the encoder's map has the output's size."""
    if tuple(encoder.shape[2:]) != tuple(size):
        raise ShapeError(
            f"{name} takes the encoder's map at the output's size {size[0]}x{size[1]}, got "
            f"{encoder.shape[2]}x{encoder.shape[3]}"
        )


def load_official(state: dict[str, Tensor], *, channels: int | None = None) -> IndexNet:
    """The module with the authors' parameters.

    Args:
        state: names ``indexnet.*`` for the holistic form, ``indexnet1.*`` to ``indexnet4.*`` for
            the one of many to one.
        channels: of the features, where they are not those of the encoder's map (holistic only).
    """
    what = "official IndexNet parameters"
    depthwise = any(name.startswith("indexnet1") for name in state)
    names = {f"indexnet{n + 1}": f"blocks.{n}" for n in range(4)} if depthwise else {}
    state = renamed(state, names | {"indexnet": "blocks.0"})
    # A single layer may stand without its number.
    if "blocks.0.weight" in state:
        state = {"blocks.0.0.weight": state["blocks.0.weight"]}
    first = required(state, "blocks.0.0.weight", what)
    config = IndexNetConfig(
        channels=first.shape[1] if channels is None else channels,
        guidance_channels=first.shape[1],
        kind="m2o" if depthwise else "hin",
        nonlinear="blocks.0.3.weight" in state,
        context=first.shape[-1] == 4,
    )
    return fill(IndexNet(config), state, what)
