"""ReSFU: configuration, module, scores, guidance stem."""

from fmupsample.upsamplers.resfu.config import ReSFUConfig, UniversalReSFUConfig
from fmupsample.upsamplers.resfu.module import ReSFU

__all__ = ["ReSFU", "ReSFUConfig", "UniversalReSFUConfig"]
