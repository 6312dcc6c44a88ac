"""Upsamplers: one interface (:mod:`~fmupsample.upsamplers.base`), several methods, head files."""

from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.classic import Bilinear, Nearest
from fmupsample.upsamplers.heads import load_head, save_head
from fmupsample.upsamplers.jbu import JointBilateral
from fmupsample.upsamplers.lda_aqu import LDAAQU, LDAAQUConfig
from fmupsample.upsamplers.loading import UPSAMPLERS, load_upsampler
from fmupsample.upsamplers.official import load_official
from fmupsample.upsamplers.resfu import ReSFU, ReSFUConfig
from fmupsample.upsamplers.sapa import SAPA, SAPAConfig

__all__ = [
    "LDAAQU",
    "SAPA",
    "UPSAMPLERS",
    "Bilinear",
    "JointBilateral",
    "LDAAQUConfig",
    "Nearest",
    "ReSFU",
    "ReSFUConfig",
    "SAPAConfig",
    "Upsampler",
    "load_head",
    "load_official",
    "load_upsampler",
    "save_head",
]
