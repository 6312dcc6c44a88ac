"""Bilateral cells: whole cells weighed by how far they are in place, colour and features.

Joint bilateral upsampling whose distances are learned: :mod:`distance` (of aligned queries from
cells) beside :mod:`~fmupsample.upsamplers.prior` (place and colour), and :mod:`projection` (keys
that any backbone has).
"""

from fmupsample.upsamplers.bilateral.config import BilateralCellsConfig
from fmupsample.upsamplers.bilateral.module import BilateralCells

__all__ = ["BilateralCells", "BilateralCellsConfig"]
