"""Backbones and upsamplers as files for other runtimes: ONNX and ``torch.export``.

:mod:`.plain` holds what replaces the library's own operators, :mod:`.parts` what can be exported;
:mod:`.programs` records it, :mod:`.files` writes, runs and compares it, and :mod:`.folder` does so
for several parts.
"""

from fmupsample.exporting.files import Exported, Format, export_part, require_onnx
from fmupsample.exporting.folder import export_all
from fmupsample.exporting.parts import PARTS, Part, make_part

__all__ = [
    "PARTS",
    "Exported",
    "Format",
    "Part",
    "export_all",
    "export_part",
    "make_part",
    "require_onnx",
]
