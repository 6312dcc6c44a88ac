"""Maps as picture files: indexed PNGs of classes, 16-bit PNGs of distances, and what goes along."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fmupsample.atomic import replacing
from fmupsample.writers.formats import TensorFile

Encode = Callable[[np.ndarray], bytes]


class PictureFile(TensorFile):
    """One map ``[1, H, W]`` as a picture, and other files made from the same map before it.

    Args:
        encode: the map ``[H, W]`` -> the bytes of the file.
        beside: other files, each with what makes its bytes of the map. They take their names before
            the picture does: where it is, they are.
    """

    suffix = ".png"

    def __init__(
        self,
        path: Path,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        meta: dict[str, str],
        *,
        encode: Encode,
        beside: Sequence[tuple[Path, Encode]] = (),
    ) -> None:
        self.encode, self.beside = encode, beside
        super().__init__(path, shape, dtype, meta)

    def _begin(self) -> None:
        self._map: np.ndarray | None = None

    def _add(self, rows: Tensor) -> None:
        self._map = rows[0].numpy()

    def _end(self) -> None:
        assert self._map is not None
        for path, encode in self.beside:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_bytes(encode(self._map))
        self._file.write(self.encode(self._map))


def indexed_png(mask: np.ndarray, palette: np.ndarray) -> bytes:
    """uint8 ``[H, W]`` and its ``palette`` uint8 ``[256, 3]``: viewers show its colours."""
    height, width = mask.shape
    picture = Image.frombytes("P", (width, height), np.ascontiguousarray(mask).tobytes())
    picture.putpalette(palette.tobytes())
    return _png(picture)


def deep_png(distance: np.ndarray, scale: float) -> bytes:
    """Metres ``[H, W]`` -> 16 bits, ``scale`` units a metre, at most 65535.

    Never 0, which in such files says that nothing is known.
    """
    units = np.clip(np.rint(distance * scale), 1, 65535).astype(np.uint16)
    return _png(Image.fromarray(units))


def npy_bytes(array: np.ndarray) -> bytes:
    """``array`` as an npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def jpeg(pixels: np.ndarray) -> bytes:
    """uint8 ``[H, W, 3]`` as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()
