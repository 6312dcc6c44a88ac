"""ReSFU, as published: configuration, module, scores, windows."""

from fmupsample.upsamplers.resfu.config import ReSFUConfig
from fmupsample.upsamplers.resfu.module import ReSFU

__all__ = ["ReSFU", "ReSFUConfig"]
