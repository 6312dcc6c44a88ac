"""Decoding picture files with Pillow: any format, one result, or one sentence why not."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from fmupsample.errors import ImageError
from fmupsample.images.find import printable

# Formats for which Pillow would start another program, or that it can only recognise.
_REFUSED = frozenset({"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"})
_ORIENTATION = 0x0112
_BITS_PER_SAMPLE = 258
_SAMPLE_FORMAT = 339
_PHOTOMETRIC = 262
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# A JPEG may be decoded at 1/2, 1/4 or 1/8 when that still leaves this many times the pixels (per
# side) that are wanted: the antialiased resize that follows then hides the difference.
_DRAFT_MARGIN = 2
_BAND_BYTES = 2**18


def open_picture(path: Path) -> Image.Image:
    """The file ``path`` as Pillow opens it, in a format that Pillow decodes by itself.

    Raises:
        ImageError: a folder, or no file at all (reading a pipe may wait for ever).
        OSError, UnidentifiedImageError, ...: as ``PIL.Image.open``.
    """
    check_regular(path, "picture")
    return Image.open(path, formats=_formats())


def check_regular(path: Path, wanted: str) -> None:
    """Raise an ImageError for what is there, but no regular file."""
    if path.is_dir():
        raise ImageError(f"{printable(path)} is a folder, not a {wanted}")
    if path.exists() and not path.is_file():
        raise ImageError(f"{printable(path)} is a pipe or device, not a {wanted}")


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _REFUSED)


def read_image(path: str | Path) -> np.ndarray:
    """The picture in ``path`` as RGB, uint8 ``[H, W, 3]``, upright.

    The EXIF orientation is applied; transparency is laid on white; of an animation the first frame
    is taken; 16-bit grey is scaled by its full range (65535 is white), and colour profiles are not
    applied. Pictures without an agreed white (32-bit integers, floats) are refused.

    Raises:
        ImageError: missing, empty, damaged, cut off, no picture, or too large to be safe.
    """
    return read_picture(path)[0]


def read_picture(
    path: str | Path, wanted: Callable[[tuple[int, int]], tuple[int, int]] | None = None
) -> tuple[np.ndarray, tuple[int, int]]:
    """Like :func:`read_image`, for callers that shrink the picture anyway.

    Args:
        wanted: given the size ``(H, W)`` of the upright picture, the size it will be shrunk to.
            A JPEG far larger than that is decoded at a fraction of its size (several times
            faster), never to less than twice the size wanted.

    Returns:
        The pixels uint8 ``[h, w, 3]``, and the full size ``(H, W)`` of the upright picture.
    """
    with _opened(path) as image:
        full = None
        if wanted is not None and image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
            turned = _orientation(image) >= 5
            full = _upright(image.size, turned)
            height, width = (_DRAFT_MARGIN * n for n in wanted(full))
            image.draft(None, (height, width) if turned else (width, height))
        pixels = _array(_to_rgb(image))
    height, width = pixels.shape[:2]
    return pixels, full or (height, width)


def rgb_pixels(image: Image.Image) -> np.ndarray:
    """An image that Pillow has opened or made, as :func:`read_image` gives those of files.

    Raises:
        ImageError: damaged, cut off, or without an agreed white.
    """
    opened = _opened(getattr(image, "filename", "") or "the image")
    try:
        return _array(_to_rgb(image))
    except Exception as error:
        raise opened.explain(error) from error


def read_size(path: str | Path) -> tuple[int, int]:
    """Size ``(H, W)`` of the upright picture, from the file's header alone.

    Raises:
        ImageError: as :func:`read_image`, as far as the header shows it.
    """
    with _opened(path) as image:
        # TIFF has turned its size already; of a PNG without the tag up front, Pillow would decode
        # all pixels to look for it behind them.
        known = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
        turned = known and _orientation(image) >= 5
        return _upright(image.size, turned)


class _opened:
    """``with _opened(path) as image``: every way in which Pillow fails becomes an ImageError."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.shown = printable(path)

    def __enter__(self) -> Image.Image:
        try:
            self.image = open_picture(self.path)
            if min(self.image.size) < 1:
                raise ImageError(f"{self.shown}: the picture has no pixels")
        except Exception as error:
            raise self.explain(error) from error
        return self.image

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.image.close()
        if isinstance(error, Exception):
            raise self.explain(error) from error

    def explain(self, error: Exception) -> ImageError:
        # Decoders fail with nearly every exception there is (struct.error, SyntaxError, KeyError,
        # zlib.error, ...): whatever a file provokes must not end a run over many files.
        if isinstance(error, ImageError):
            return error
        if isinstance(error, FileNotFoundError):
            return ImageError(f"{self.shown} does not exist")
        if isinstance(error, Image.DecompressionBombError):
            limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
            return ImageError(
                f"{self.shown} claims more than the {limit} million pixels that are decoded safely "
                "(a damaged or hostile file?); if it is genuine, make a smaller copy"
            )
        if isinstance(error, MemoryError):
            return ImageError(f"{self.shown} does not fit into memory; make a smaller copy")
        if isinstance(error, UnidentifiedImageError):
            if self._empty():
                return ImageError(f"{self.shown} is empty (0 bytes)")
            return ImageError(
                f"{self.shown} is not a picture in a format that can be read "
                "(its content was looked at, not its extension)"
            )
        if isinstance(error, OSError) and error.strerror:
            return ImageError(f"{self.shown} cannot be read: {error.strerror}")
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return ImageError(f"{self.shown} is damaged or cut off: {reason}")

    def _empty(self) -> bool:
        try:
            return self.path.stat().st_size == 0
        except OSError:
            return False


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except (OSError, ValueError, SyntaxError, struct.error, KeyError, TypeError, IndexError):
        return 1  # damaged metadata is no reason to refuse the pixels
    return value if value in range(1, 9) else 1


def _upright(size: tuple[int, int], turned: bool) -> tuple[int, int]:
    width, height = size
    return (width, height) if turned else (height, width)


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    # Asked after loading: formats that turn themselves (TIFF) have dropped the tag by now.
    turn = _TURNS.get(_orientation(image))
    if image.mode == "F" or image.mode.startswith("I"):
        image = _grey_to_8_bit(image)
    elif image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size, (255, 255, 255))
        image.paste(rgba, mask=rgba.getchannel("A"))
    if image.mode != "RGB":  # else it would be copied
        image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _array(image: Image.Image) -> np.ndarray:
    """The pixels of an RGB picture, uint8 ``[H, W, 3]``."""
    # Asked for as a whole, Pillow makes them twice, as pieces and as one; and NumPy asks twice.
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, _BAND_BYTES // pixels[0].nbytes)
    for top in range(0, len(pixels), rows):
        band = pixels[top : top + rows]
        part = image.crop((0, top, image.width, top + len(band)))
        band[:] = np.frombuffer(part.tobytes(), np.uint8).reshape(band.shape)
    return pixels


def _grey_to_8_bit(image: Image.Image) -> Image.Image:
    """Deep grey (modes I;16, I, F) -> L, the whole range of the file's type onto 0..255."""
    tags = getattr(image, "tag_v2", {})  # TIFF only
    bits = int(np.atleast_1d(tags.get(_BITS_PER_SAMPLE, 16))[0])
    signed = int(np.atleast_1d(tags.get(_SAMPLE_FORMAT, 1))[0]) == 2
    known = image.mode != "I" or image.format in ("PNG", "PPM", "TIFF")
    if image.mode == "F" or bits > 16 or not known:
        raise ImageError(
            f"{printable(getattr(image, 'filename', '') or 'the image')} has "
            f"{'floating-point' if image.mode == 'F' else '32-bit'}"
            " pixels, for which black and white are not defined; save it with 8 or 16 bits"
        )
    grey = np.asarray(image).astype(np.int64)
    top = 2**bits - 1
    if signed:
        grey += 2 ** (bits - 1)
    if tags.get(_PHOTOMETRIC) == 0:  # "white is zero": Pillow inverts it for 8 bits only
        grey = top - grey
    return Image.fromarray(((grey.clip(0, top) * 255 + top // 2) // top).astype(np.uint8))
