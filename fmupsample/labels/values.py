"""What stands in a label file: an integer for each pixel, never an interpolated colour."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError

import numpy as np

from fmupsample.errors import ImageError, UsageError
from fmupsample.images.find import printable
from fmupsample.images.read import check_regular, open_picture
from fmupsample.labels.classes import COLOUR, IGNORE, pack_colours

# Modes whose pixels are numbers as they stand; P gives the index and not the colour.
_NUMBERS = ("P", "L", "1", "I", "I;16", "I;16B", "I;16L", "I;16N")
# What np.load raises on damaged files: it reads the header of one as Python does.
_UNREADABLE_ARRAY = (
    OSError, ValueError, EOFError, SyntaxError, TokenError, TypeError, RecursionError, MemoryError,
)  # fmt: skip
_LOSSY = ("JPEG", "MPO")


def read_values(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """The numbers of a label file, int32 ``[H, W]``.

    Indices of an indexed picture, values of a grey one of 1, 8 or 16 bits or of an npy file of
    integers, and of a colour picture
    ``r << 16 | g << 8 | b`` plus :data:`~fmupsample.labels.classes.COLOUR`, so that colours and
    numbers cannot be taken for each other. A colour picture in which all pixels are grey counts as
    grey.

    Raises:
        ImageError: unreadable, JPEG, transparent, floating point, or not of ``size`` (H, W).
    """
    shown = printable(path)
    if path.suffix.lower() == ".npy":
        return check_size(_read_array(path), path, size)
    try:
        with open_picture(path) as image:
            kind, mode = image.format, image.mode
            if mode in ("RGBA", "LA", "PA"):
                if np.asarray(image.getchannel("A")).min() < 255:
                    raise ImageError(
                        f"the labels {shown} have transparent pixels; save them opaque"
                    )
                mode = {"RGBA": "RGB", "LA": "L"}.get(mode, "RGB")
                image = image.convert(mode)
            values = np.asarray(image) if mode in (*_NUMBERS, "RGB") else None
    except ImageError:
        raise
    except Exception as error:  # whatever a decoder raises on a damaged file
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ImageError(f"the labels {shown} cannot be read: {reason}") from error
    if kind in _LOSSY:
        raise ImageError(f"the labels {shown} are a JPEG, which blurs numbers; save them as PNG")
    if values is None:
        raise ImageError(f"the labels {shown} have pixels of mode {mode}; save them as a PNG")
    check_size(values, path, size)
    if values.ndim == 2:
        return values.astype(np.int32)
    if (values[..., :1] == values).all():
        return values[..., 0].astype(np.int32)
    return pack_colours(values)


def check_size(
    values: np.ndarray, path: Path, size: tuple[int, int] | None, what: str = "labels"
) -> np.ndarray:
    """``values`` ``[H, W, ...]`` of the file ``path``, or an ImageError if ``size`` is another."""
    if size is not None and values.shape[:2] != tuple(size):
        raise ImageError(
            f"the {what} {printable(path)} have {values.shape[1]}x{values.shape[0]} pixels, their "
            f"picture has {size[1]}x{size[0]}"
        )
    return values


def load_array(path: Path, what: str = "labels") -> np.ndarray:
    """The array of an npy file. What is no array is an ImageError, pickles among it."""
    check_regular(path, f"file of {what}")
    try:
        values = np.load(path, allow_pickle=False)
    except _UNREADABLE_ARRAY as error:
        raise ImageError(f"the {what} {printable(path)} cannot be read: {error}") from error
    if not isinstance(values, np.ndarray):
        raise ImageError(f"the {what} {printable(path)} are an archive: expected one array")
    return values


def _read_array(path: Path) -> np.ndarray:
    """The integers of an npy file, int32 ``[H, W]``."""
    values = load_array(path)
    if values.ndim != 2 or values.dtype.kind not in "uib":
        raise ImageError(
            f"the labels {printable(path)} are {values.dtype} {list(values.shape)}: expected "
            "integers [H, W]"
        )
    if values.size and not -(2**31) <= int(values.min()) <= int(values.max()) < COLOUR:
        raise ImageError(f"the labels {printable(path)} hold numbers that are no classes")
    return values.astype(np.int32)


def read_labels(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Class numbers uint8 ``[H, W]``: the indices of an indexed PNG, or the values of a grey one.

    Raises:
        ImageError: as :func:`read_values`; colours; more than a byte a pixel.
    """
    values = read_values(path, size)
    if values.min() < 0 or values.max() > 255:
        raise ImageError(
            f"the labels {printable(path)} must have one byte a pixel; their values reach "
            f"{'colours' if values.max() > 0xFFFF else values.max()}"
        )
    return values.astype(np.uint8)


def read_palette(path: Path) -> list[tuple[int, int, int]] | None:
    """The colours of an indexed PNG, by index; ``None`` where it has none."""
    try:
        with open_picture(path) as image:
            flat = image.getpalette("RGB") if image.mode == "P" else None
    except Exception:  # it is read again, and then the reason is said
        return None
    return flat and [tuple(flat[i : i + 3]) for i in range(0, len(flat) - 2, 3)]


def count_classes(files: Sequence[Path]) -> int:
    """One more than the largest class number in all ``files``.

    Raises:
        UsageError: fewer than two classes, or a file that cannot be used.
    """
    largest = -1
    for path in files:
        try:
            values = read_labels(path)
        except ImageError as error:
            raise UsageError(str(error)) from error
        values = values[values != IGNORE]
        if values.size:
            largest = max(largest, int(values.max()))
    if largest < 1:
        raise UsageError(f"the {len(files)} label files hold fewer than two classes")
    return largest + 1
