"""Contact sheets of what ``visualize`` has drawn: each photograph with its colours beside it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, PngImagePlugin

from fmupsample.atomic import replacing
from fmupsample.draw.contact import PER_PAGE, Entry, draw_sheet
from fmupsample.errors import FmupsampleError, OutputError
from fmupsample.images.find import printable
from fmupsample.images.read import read_picture
from fmupsample.progress import Progress
from fmupsample.runs.manifest import Record

MAX_PAGES = 20
_MARK = "fmupsample contact sheet "  # in the file, with a digest of what it shows
_SIDE = 400  # of a photograph on a sheet, pixels


def sheet_name(page: int, suffix: str) -> str:
    """``contact_sheet.png``, ``contact_sheet_2.png``, ..."""
    return f"contact_sheet{f'_{page + 1}' if page else ''}{suffix}"


def save_sheets(
    out: Path, records: Sequence[Record], suffix: str, progress: Progress
) -> list[Path]:
    """Sheets of these drawings, made by this run or before.

    Pages that show what they should already are left, pages of an earlier, larger run removed.

    Args:
        records: of drawings, with where the photograph and the colours lie in them.

    Raises:
        OutputError: they cannot be written.
    """
    if len(records) < 2:
        return []
    most = MAX_PAGES * PER_PAGE
    if len(records) > most:
        progress.warn(f"the contact sheets show the first {most} of {len(records)} pictures")
    pages = [records[n : n + PER_PAGE] for n in range(0, min(len(records), most), PER_PAGE)]
    paths = [out / sheet_name(n, suffix) for n in range(len(pages))]
    for number, (page, path) in enumerate(zip(pages, paths, strict=True), start=1):
        note = f"{number} of {len(pages)}" if len(pages) > 1 else ""
        shown = [[r["output"], r["options_hash"], r.get("pca_fingerprint"), r["bytes"],
                  r["source_bytes"], r["source_mtime_ns"]] for r in page]  # fmt: skip
        mark = _MARK + sha256(repr([note, shown]).encode()).hexdigest()[:16]
        if mark_of(path) == mark:
            continue
        sheet = draw_sheet([_entry(out, record) for record in page], note=note)
        try:
            with replacing(path) as temporary:
                temporary.write_bytes(_encode(sheet, suffix, mark))
        except OSError as error:
            reason = f"{printable(path)} cannot be written: {error.strerror}"
            raise OutputError(f"{reason}; the pictures finished so far are kept") from error
    for n in range(len(pages), MAX_PAGES):
        if mark_of(out / sheet_name(n, suffix)) is not None:
            (out / sheet_name(n, suffix)).unlink()
    return paths


def mark_of(path: Path) -> str | None:
    """What a sheet of ours says that it shows; ``None``: it is not there, or not ours."""
    try:
        with Image.open(path) as image:
            comment = image.info.get("comment", b"")
    except (OSError, ValueError, SyntaxError):
        return None
    text = comment.decode("latin-1") if isinstance(comment, bytes) else str(comment)
    return text if text.startswith(_MARK) else None


def _encode(pixels: np.ndarray, suffix: str, mark: str) -> bytes:
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    if suffix == ".png":
        text = PngImagePlugin.PngInfo()
        text.add_text("comment", mark)
        image.save(buffer, "PNG", pnginfo=text, compress_level=4)
    else:
        image.save(buffer, "JPEG", quality=92, subsampling=0, comment=mark)
    return buffer.getvalue()


def _entry(out: Path, record: Record) -> Entry:
    name = str(PurePosixPath(record["output"]).with_suffix(""))
    return Entry(name, record["colours"][:1:-1], partial(_load, out, record))


def _load(out: Path, record: Record) -> tuple[np.ndarray, np.ndarray]:
    """The photograph and its colours, cut from the drawing where it holds both."""
    with Image.open(out / record["output"]) as image:
        drawing = np.asarray(image.convert("RGB"))
    colours = _cut(drawing, record["colours"])
    if record["photo"]:
        return _cut(drawing, record["photo"]), colours
    try:
        path = Path(record["source"])
        return read_picture(path, lambda _: (_SIDE, _SIDE))[0], colours
    except FmupsampleError:  # gone since
        return colours, colours


def _cut(pixels: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """What lies in ``box`` (left, top, width, height)."""
    x, y, width, height = box
    return pixels[y : y + height, x : x + width]
