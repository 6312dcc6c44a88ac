"""ReSFU: configuration, module, scores, guidance stem."""

from fmupsample.upsamplers.resfu.config import ReSFUConfig
from fmupsample.upsamplers.resfu.module import ReSFU

__all__ = ["ReSFU", "ReSFUConfig"]
