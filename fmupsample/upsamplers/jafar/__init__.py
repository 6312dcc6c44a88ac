"""JAFAR: attention of pixels to all cells, for the features of one backbone."""

from fmupsample.upsamplers.jafar.config import JAFARConfig
from fmupsample.upsamplers.jafar.module import JAFAR

__all__ = ["JAFAR", "JAFARConfig"]
