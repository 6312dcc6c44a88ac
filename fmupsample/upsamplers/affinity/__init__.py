"""Affinity: which cells around a pixel show the object that the pixel belongs to, from the image.

The data's way: :mod:`encoder` (image -> embedding), :mod:`scores` (embedding -> a score for each
pixel and cell), :mod:`module` (scores -> kernel weights, whole or window by window).
"""

from fmupsample.upsamplers.affinity.config import AffinityConfig
from fmupsample.upsamplers.affinity.module import Affinity

__all__ = ["Affinity", "AffinityConfig"]
