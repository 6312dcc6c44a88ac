"""Backbones and upsamplers as files for other runtimes: ONNX and ``torch.export``.

:mod:`.plain` says what is inside instead of the library's own operators, :mod:`.parts` what can be
exported, :mod:`.programs` records it and :mod:`.files` writes, runs and compares it.
"""

from fmupsample.exporting.files import Exported, Format, export_part
from fmupsample.exporting.parts import PARTS, Part, make_part

__all__ = ["PARTS", "Exported", "Format", "Part", "export_part", "make_part"]
