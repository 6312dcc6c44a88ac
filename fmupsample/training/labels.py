"""Labels beside pictures: indexed PNGs of the same names, for ``--objective task``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fmupsample.errors import ImageError, UsageError
from fmupsample.images.find import Source, printable
from fmupsample.training.objective import IGNORED


def find_labels(folders: Sequence[Path], sources: Sequence[Source]) -> dict[Source, Path]:
    """The label file of each picture: the same path below one of ``folders``, ending in ``.png``.

    A picture in ``sub/a.jpg`` has its labels in ``sub/a.png``, or in ``a.png``.

    Raises:
        UsageError: no such folder, or pictures without labels.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"the folder of labels {printable(folder)} does not exist")
    found, missing = {}, []
    for source in sources:
        relative = Path(*source.relative.parts).with_suffix(".png")
        for path in (f / name for f in folders for name in (relative, relative.name)):
            if path.is_file():
                found[source] = path
                break
        else:
            missing.append(source)
    if missing:
        raise UsageError(
            f"{len(missing)} of {len(sources)} pictures have no labels in "
            f"{', '.join(map(printable, folders))}: {missing[0]} needs "
            f"{missing[0].relative.with_suffix('.png')} there"
        )
    return found


def read_labels(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Class numbers uint8 ``[H, W]``: the indices of an indexed PNG, or the values of a grey one.

    Raises:
        ImageError: unreadable, in colour, or not of ``size`` (H, W).
    """
    shown = printable(path)
    try:
        with Image.open(path) as image:
            mode = image.mode
            values = np.asarray(image) if mode in ("P", "L") else None
    except Exception as error:  # whatever a decoder raises on a damaged file
        raise ImageError(f"the labels {shown} cannot be read: {error}") from error
    if values is None:
        raise ImageError(f"the labels {shown} must have one byte a pixel; their mode is {mode}")
    if size is not None and values.shape != tuple(size):
        raise ImageError(
            f"the labels {shown} have {values.shape[1]}x{values.shape[0]} pixels, their picture "
            f"has {size[1]}x{size[0]}"
        )
    return values


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
        values = values[values != IGNORED]
        if values.size:
            largest = max(largest, int(values.max()))
    if largest < 1:
        raise UsageError(f"the {len(files)} label files hold fewer than two classes")
    return largest + 1
