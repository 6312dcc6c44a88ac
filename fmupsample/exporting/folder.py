"""A folder of exported files, each with a script that uses it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from pathlib import Path

from fmupsample.atomic import replacing
from fmupsample.backbones import Backbone
from fmupsample.errors import OutputError, UsageError
from fmupsample.exporting.files import Exported, Format, export_part
from fmupsample.exporting.parts import make_part
from fmupsample.exporting.script import script
from fmupsample.images import printable
from fmupsample.runs.lock import FolderLock
from fmupsample.upsamplers.base import Upsampler


def export_all(
    backbone: Backbone,
    upsampler: Upsampler,
    folder: Path,
    parts: Sequence[str] = ("fused",),
    *,
    size: tuple[int, int] | None = None,
    kind: Format = Format.onnx,
    opset: int = 18,
    dynamic: Collection[str] = (),
    channels: int | None = None,
    overwrite: bool = False,
) -> list[Exported]:
    """Export ``parts`` into ``folder``: ``PART.onnx`` (or ``.pt2``) and ``use_PART_onnx.py``.

    After an error nothing of the part that failed is there; parts before it stay.

    Args:
        parts: see :func:`~fmupsample.exporting.parts.make_part`; channels: of ``reassemble``.
        size: ``(H, W)`` in pixels; by default what suits the backbone.
        opset, dynamic: see :func:`~fmupsample.exporting.files.export_part`.
        overwrite: replace files that exist.

    Raises:
        UsageError: something that cannot be exported so; nothing was written.
        OutputError: a result differs, the folder cannot be written, or a file is in the way.
    """
    if not parts:
        raise UsageError("no part to export is named")
    size = size or backbone.fixed_size or (backbone.default_image_size,) * 2
    made = [make_part(name, backbone, upsampler, size, channels) for name in dict.fromkeys(parts)]
    paths = [folder / f"{part.name}.{kind}" for part in made]
    for path in paths:
        if path.exists() and not overwrite:
            raise OutputError(f"{printable(path)} exists; --overwrite replaces it")
    files = []
    with FolderLock(folder):
        for part, path in zip(made, paths, strict=True):
            with _written(folder):
                file = export_part(part, path, kind, opset=opset, dynamic=dynamic)
                with replacing(file.script) as temporary:
                    temporary.write_text(script(part, path.name, file.shapes, backbone))
            files.append(file)
    return files


@contextlib.contextmanager
def _written(folder: Path):
    try:
        yield
    except OSError as error:
        raise OutputError(f"{printable(folder)} cannot be written: {error.strerror}") from error
