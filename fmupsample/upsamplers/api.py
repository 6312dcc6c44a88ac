"""The public names of :mod:`fmupsample.upsamplers`, which resolves them on first use."""

from fmupsample.upsamplers.affinity import Affinity, AffinityConfig
from fmupsample.upsamplers.anyup import AnyUp, AnyUpConfig
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.bilateral import BilateralCells, BilateralCellsConfig
from fmupsample.upsamplers.carafe import CARAFE, CARAFEConfig
from fmupsample.upsamplers.classic import Bicubic, Bilinear, Nearest
from fmupsample.upsamplers.convolution import (
    Deconvolution,
    DeconvolutionConfig,
    PixelShuffle,
    PixelShuffleConfig,
)
from fmupsample.upsamplers.decoders import build_for_decoder
from fmupsample.upsamplers.dysample import DySample, DySampleConfig
from fmupsample.upsamplers.fade import FADE, FADEConfig
from fmupsample.upsamplers.featup import LearnedBilateral, LearnedBilateralConfig
from fmupsample.upsamplers.guided import GuidedFilter
from fmupsample.upsamplers.heads import load_head, save_head
from fmupsample.upsamplers.hub import from_pretrained, push_to_hub, save_pretrained
from fmupsample.upsamplers.jafar import JAFAR, JAFARConfig
from fmupsample.upsamplers.jbu import JointBilateral
from fmupsample.upsamplers.lda_aqu import LDAAQU, LDAAQUConfig
from fmupsample.upsamplers.loading import load_upsampler
from fmupsample.upsamplers.naf import NAF, NAFConfig
from fmupsample.upsamplers.official import load_official
from fmupsample.upsamplers.resfu import ReSFU, ReSFUConfig
from fmupsample.upsamplers.sapa import SAPA, SAPAConfig
from fmupsample.upsamplers.stack import (
    CARAFEStack,
    DeconvolutionStack,
    DySampleStack,
    LearnedBilateralStack,
    PixelShuffleStack,
    Stack,
    StackConfig,
)
from fmupsample.upsamplers.uplift import UPLiFT, UPLiFTConfig

__all__ = [
    "CARAFE",
    "FADE",
    "JAFAR",
    "LDAAQU",
    "NAF",
    "SAPA",
    "Affinity",
    "AffinityConfig",
    "AnyUp",
    "AnyUpConfig",
    "Bicubic",
    "BilateralCells",
    "BilateralCellsConfig",
    "Bilinear",
    "CARAFEConfig",
    "CARAFEStack",
    "Deconvolution",
    "DeconvolutionConfig",
    "DeconvolutionStack",
    "DySample",
    "DySampleConfig",
    "DySampleStack",
    "FADEConfig",
    "GuidedFilter",
    "JAFARConfig",
    "JointBilateral",
    "LDAAQUConfig",
    "LearnedBilateral",
    "LearnedBilateralConfig",
    "LearnedBilateralStack",
    "NAFConfig",
    "Nearest",
    "PixelShuffle",
    "PixelShuffleConfig",
    "PixelShuffleStack",
    "ReSFU",
    "ReSFUConfig",
    "SAPAConfig",
    "Stack",
    "StackConfig",
    "UPLiFT",
    "UPLiFTConfig",
    "Upsampler",
    "build_for_decoder",
    "from_pretrained",
    "load_head",
    "load_official",
    "load_upsampler",
    "push_to_hub",
    "save_head",
    "save_pretrained",
]
