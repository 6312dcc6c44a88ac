"""One small instance of every upsampler, and what may be expected of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fmupsample import upsamplers as u

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import decoders

CHANNELS = 8


@dataclass(frozen=True)
class Member:
    """How to build it, for features of 8 channels.

    Attributes:
        guidance: channels of its guidance; 0: none is needed.
        convex: results are averages of features: they stay in their range.
        constant: equal features everywhere give the same everywhere.
        smooth: has gradients everywhere in its parameters and inputs.
    """

    build: Callable[[], u.Upsampler]
    guidance: int = 0
    convex: bool = True
    constant: bool = True
    smooth: bool = True

    def make(self, *, scramble: bool = True) -> u.Upsampler:
        """In float64, in evaluation mode, with parameters that are not those of the beginning."""
        torch.manual_seed(0)
        up = self.build().double().eval()
        if scramble:
            for parameter in up.parameters():
                torch.nn.init.normal_(parameter, std=0.4)
        return up

    def inputs(
        self, cells: tuple[int, int], size: tuple[int, int], batch: int = 1
    ) -> tuple[Tensor, Tensor | None]:
        """Features ``[B, 8, h, w]`` and the guidance, or ``None``; always the same ones."""
        torch.manual_seed(1)
        x = torch.randn(batch, CHANNELS, *cells).double()
        guidance = torch.randn(batch, self.guidance, *size).double() if self.guidance else None
        return x, guidance


def _stack(kind: type[u.Stack], **operator) -> Callable[[], u.Upsampler]:
    return lambda: kind(u.StackConfig(CHANNELS, stages=4, operator=operator))


ANY_RATIO = {
    "nearest": Member(u.Nearest),
    "bilinear": Member(u.Bilinear),
    "bicubic": Member(u.Bicubic, convex=False),
    "jbu": Member(u.JointBilateral, 3),
    "guided": Member(u.GuidedFilter, 3, convex=False),
    "resfu": Member(
        lambda: u.ReSFU(u.ReSFUConfig(CHANNELS, embedding=8, middle=16, groups=2, norm_groups=4)), 3
    ),
    "sapa": Member(lambda: u.SAPA(u.SAPAConfig(CHANNELS, guidance_channels=4, embedding=4)), 3),
    "sapa-b map": Member(
        lambda: u.SAPA(
            u.SAPAConfig(CHANNELS, 5, stem=False, similarity="bilinear", normalisation="softplus")
        ),
        5,
    ),
    "sapa-i": Member(
        lambda: u.SAPA(u.SAPAConfig(CHANNELS, stem=False, similarity="inner")), CHANNELS
    ),
    "lda-aqu": Member(lambda: u.LDAAQU(u.LDAAQUConfig(CHANNELS, reduction=2, reach=2.0))),
    "lda-aqu groups": Member(lambda: u.LDAAQU(u.LDAAQUConfig(CHANNELS, 2, groups=2, heads=2))),
    "jafar": Member(lambda: u.JAFAR(u.JAFARConfig(CHANNELS, embedding=16, heads=2)), 3),
    "naf": Member(
        lambda: u.NAF(u.NAFConfig(embedding=16, heads=2, rotary_heads=2, kernel_size=3)), 3
    ),
    "uplift": Member(lambda: u.UPLiFT(u.UPLiFTConfig(CHANNELS, width=2, guide=8)), 3),
    "fade": Member(lambda: u.FADE(u.FADEConfig(CHANNELS, guidance_channels=4, compressed=6)), 3),
    "fade-lite": Member(lambda: u.FADE(u.FADEConfig(CHANNELS, 5, stem=False, lite=True)), 5),
    "carafe": Member(_stack(u.CARAFEStack, compressed=6)),
    "dysample": Member(_stack(u.DySampleStack)),
    "featup": Member(
        _stack(u.LearnedBilateralStack, kernel_size=3), 3, convex=False, constant=False
    ),
    "deconvolution": Member(_stack(u.DeconvolutionStack), convex=False, constant=False),
    "pixel-shuffle": Member(_stack(u.PixelShuffleStack), convex=False, constant=False),
}
DOUBLING = {
    "carafe": Member(lambda: u.CARAFE(u.CARAFEConfig(CHANNELS, compressed=6))),
    "dysample lp": Member(lambda: u.DySample(u.DySampleConfig(CHANNELS, groups=1))),
    "dysample pl": Member(
        lambda: u.DySample(u.DySampleConfig(CHANNELS, style="pl", dynamic_scope=True))
    ),
    "jbu-stage": Member(
        lambda: u.LearnedBilateral(u.LearnedBilateralConfig(CHANNELS, 4, correction=False)),
        4,
        convex=False,  # bicubic first
    ),
    "a2u": Member(lambda: decoders.A2U(decoders.A2UConfig(CHANNELS, 6)), 6),
    "a2u channels": Member(lambda: decoders.A2U(decoders.A2UConfig(CHANNELS, 6, shared=False)), 6),
    "fade gate": Member(
        lambda: u.FADE(u.FADEConfig(CHANNELS, CHANNELS, stem=False, gate=True)),
        CHANNELS,
        convex=False,
        constant=False,
    ),
    "indexnet hin": Member(
        lambda: decoders.IndexNet(decoders.IndexNetConfig(CHANNELS, 5)),
        5,
        convex=False,
        constant=False,
    ),
    "indexnet m2o": Member(
        lambda: decoders.IndexNet(decoders.IndexNetConfig(CHANNELS, kind="m2o", context=False)),
        CHANNELS,
        convex=False,
        constant=False,
    ),
    "max-unpooling": Member(
        decoders.MaxUnpooling, CHANNELS, convex=False, constant=False, smooth=False
    ),
    "deconvolution": Member(
        lambda: u.Deconvolution(u.DeconvolutionConfig(CHANNELS)), convex=False, constant=False
    ),
    "pixel-shuffle": Member(
        lambda: u.PixelShuffle(u.PixelShuffleConfig(CHANNELS)), convex=False, constant=False
    ),
}
