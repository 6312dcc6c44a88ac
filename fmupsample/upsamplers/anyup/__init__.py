"""AnyUp: attention of pixels to the cells in a window, for the features of any backbone."""

from fmupsample.upsamplers.anyup.config import AnyUpConfig
from fmupsample.upsamplers.anyup.module import AnyUp

__all__ = ["AnyUp", "AnyUpConfig"]
