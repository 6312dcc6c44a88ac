"""NAF: attention of pixels to a neighbourhood of cells, for the features of any backbone."""

from fmupsample.upsamplers.naf.config import NAFConfig
from fmupsample.upsamplers.naf.module import NAF

__all__ = ["NAF", "NAFConfig"]
