"""What upsamplers cost, by formula: parameters, and multiply-adds.

Each class has its formula in :meth:`~fmupsample.upsamplers.base.Upsampler.macs`, next to what it
counts. Published tables count a multiply-add as one operation, and so do these. Counted are
convolutions and linear maps, similarities, bilinear samples at learned places, and reassembly; not
norms, activations, softmax, and the resizing of guidance.

The formulas are those of the methods as they are published (an implementation may need fewer:
ReSFU's shortcuts are in ``keys.py``). In them ``lr`` is the number of cells, ``hr`` that of output
pixels, and k is K * K.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

Size = tuple[int, int]  # rows and columns of a map
# Multiply-adds of one bilinear sample of one channel, and of one bicubic one.
BILINEAR, BICUBIC = 4, 16


@dataclass(frozen=True)
class Cost:
    """What one picture costs.

    Attributes:
        parameters: numbers that are learned.
        convolution: multiply-adds of layers with these.
        neighbours: multiply-adds of similarities, samples and reassembly.
    """

    parameters: int
    convolution: int
    neighbours: int

    @property
    def macs(self) -> int:
        return self.convolution + self.neighbours


def per_place(*modules: nn.Module | None) -> int:
    """Multiply-adds of all convolutions in these modules at one place of their maps."""
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    layers = (layer for module in modules if module is not None for layer in module.modules())
    return sum(layer.weight.numel() for layer in layers if isinstance(layer, kinds))
