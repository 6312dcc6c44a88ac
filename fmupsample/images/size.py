"""Sizes: what the user asks for, what the backbone sees, and the way back to original pixels.

All sizes are ``(H, W)`` in pixels. All points are ``(x, y)`` in continuous coordinates: pixel
column ``i`` covers ``[i, i + 1)`` and its centre is at ``i + 0.5``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Protocol

from fmupsample.errors import ImageError, UsageError

Size = tuple[int, int]

_MAX_SIDE = 16384  # more is a typing error, or a run that could not end
_MAX_ASPECT = 16  # with "short side = N", a 10000 x 1 picture would become 4480000 pixels long


class Grid(Protocol):
    """What :func:`plan_frame` asks of a backbone."""

    size_multiple: Size
    fixed_size: Size | None
    default_image_size: int


@dataclass(frozen=True)
class ImageSize:
    """At which size pictures are shown to the backbone: one of three ways.

    Attributes:
        short: the short side in pixels, aspect ratio kept; or ``None``.
        exact: ``(H, W)`` for every picture; or ``None``.
        Neither: "native", the picture's own pixels.
    """

    short: int | None = None
    exact: Size | None = None

    @classmethod
    def parse(cls, text: str | int) -> ImageSize:
        """From ``"448"``, ``"448x672"`` (height x width) or ``"native"``.

        Raises:
            UsageError: anything else, or a side that is not in 1..16384.
        """
        word = str(text).strip().lower()
        if word == "native":
            return cls()
        numbers = _numbers(word)
        if numbers is None or len(numbers) > 2 or not all(1 <= n <= _MAX_SIDE for n in numbers):
            raise UsageError(
                f"image size {text!r} is not understood: give the short side in pixels (448), "
                f"HxW (448x672), each from 1 to {_MAX_SIDE}, or native"
            )
        return cls(short=numbers[0]) if len(numbers) == 1 else cls(exact=(numbers[0], numbers[1]))

    @classmethod
    def of(cls, size: ImageSize | int | str | tuple[int, int] | None) -> ImageSize | None:
        """From whatever a program gives: what :meth:`parse` reads, ``(H, W)``, or ``None``.

        Raises:
            UsageError: anything else.
        """
        if size is None or isinstance(size, cls):
            return size
        if isinstance(size, tuple | list):
            return cls.parse("x".join(map(str, size)))
        return cls.parse(size)

    def __str__(self) -> str:
        if self.exact:
            return f"{self.exact[0]}x{self.exact[1]}"
        return str(self.short) if self.short else "native"


@dataclass(frozen=True)
class Frame:
    """Where a picture lies in what the backbone sees: at the top left, padded right and below.

    Attributes:
        original: size of the upright picture in its file.
        placed: size to which the picture is resized inside the canvas.
        canvas: size of the backbone's input; at least ``placed``.
    """

    original: Size
    placed: Size
    canvas: Size

    @property
    def padded(self) -> bool:
        return self.placed != self.canvas

    def to_canvas(self, xy: tuple[float, float]) -> tuple[float, float]:
        """A point of the original picture, in canvas pixels."""
        return (
            xy[0] * self.placed[1] / self.original[1],
            xy[1] * self.placed[0] / self.original[0],
        )

    def to_original(self, xy: tuple[float, float]) -> tuple[float, float]:
        """A point of the canvas, in pixels of the original picture (outside it: in the padding)."""
        return (
            xy[0] * self.original[1] / self.placed[1],
            xy[1] * self.original[0] / self.placed[0],
        )

    def to_json(self) -> dict[str, list[int]]:
        """``{"original": [H, W], "placed": [H, W], "canvas": [H, W]}``."""
        return {
            "original": list(self.original),
            "placed": list(self.placed),
            "canvas": list(self.canvas),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Frame:
        return cls(*((int(data[k][0]), int(data[k][1])) for k in ("original", "placed", "canvas")))


def check_image_size(image_size: ImageSize | None, backbone: Grid) -> None:
    """Raise the UsageError that :func:`plan_frame` would, before any picture is opened."""
    multiple, fixed = backbone.size_multiple, backbone.fixed_size
    if image_size is None:
        return
    if fixed is not None:
        if image_size.exact == fixed or image_size.short == min(fixed):
            return
        raise UsageError(
            f"this backbone takes pictures of {fixed[0]}x{fixed[1]} only, not {image_size}: "
            "leave --image-size away (pictures are fitted into it), or choose another backbone"
        )
    if image_size.exact is not None:
        nearest = tuple(_nearest(n, m) for n, m in zip(image_size.exact, multiple, strict=True))
        if nearest != image_size.exact:
            raise UsageError(
                f"image size {image_size} does not fit this backbone, whose sides are multiples of "
                f"{multiple[0]}x{multiple[1]}: the nearest is {nearest[0]}x{nearest[1]}"
            )


def plan_frame(
    original: Size, image_size: ImageSize | None, backbone: Grid, fit: str = "resize"
) -> Frame:
    """How a picture of size ``original`` is shown to ``backbone``.

    With a short side or native size, the sides are brought onto the backbone's grid by rounding to
    the nearest multiple (``fit="resize"``: the aspect ratio changes by less than half a cell), or
    by padding up to the next one (``fit="pad"``). An exact size is stretched to, or with "pad"
    fitted into. A backbone of fixed size gets the whole picture fitted into that size.
    ``image_size=None`` means the backbone's ``default_image_size``.

    Raises:
        UsageError: a size that this backbone does not take, an unknown ``fit``.
        ImageError: a picture so long and thin that its long side would be out of hand.
    """
    if fit not in ("resize", "pad"):
        raise UsageError(f"--fit {fit} is unknown: use resize or pad")
    check_image_size(image_size, backbone)
    if image_size is not None and image_size.exact is not None and fit == "resize":
        return Frame(original, image_size.exact, image_size.exact)
    into = backbone.fixed_size or (image_size.exact if image_size else None)
    if into is not None:
        scale = min(into[0] / original[0], into[1] / original[1])
        placed = tuple(
            min(max(1, round(n * scale)), limit) for n, limit in zip(original, into, strict=True)
        )
        return Frame(original, placed, into)
    if image_size is None:
        image_size = ImageSize(short=backbone.default_image_size)
    wanted: tuple[float, float] = original
    if image_size.short is not None:
        if max(original) > _MAX_ASPECT * min(original):
            raise ImageError(
                f"a picture of {original[1]}x{original[0]} pixels is too long and thin for a short "
                f"side of {image_size.short}: give --image-size HxW or native"
            )
        scale = image_size.short / min(original)
        wanted = (original[0] * scale, original[1] * scale)
    multiple = backbone.size_multiple
    if fit == "resize":
        size = tuple(_nearest(n, m) for n, m in zip(wanted, multiple, strict=True))
        return Frame(original, size, size)
    placed = tuple(max(1, round(n)) for n in wanted)
    canvas = tuple(math.ceil(n / m) * m for n, m in zip(placed, multiple, strict=True))
    return Frame(original, placed, canvas)


def parse_output_size(text: str, frame: Frame, grid: Size) -> Size:
    """Size ``(H, W)`` of the upsampled map, which covers the picture without its padding.

    Args:
        text: ``"image"`` (what the backbone saw of the picture), ``"original"`` (the pixels of the
            file), ``"HxW"``, or ``"x4"``: 4 (any number >= 1) times the low-resolution grid.
        grid: size ``(h, w)`` of the backbone's feature map of the whole canvas.

    Raises:
        UsageError: not understood, or out of range.
    """
    word = check_output_size(text)
    if word == "image":
        return frame.placed
    if word == "original":
        return frame.original
    if word.startswith("x"):
        ratio = float(word[1:])
        return tuple(
            max(1, round(n * ratio * p / c))
            for n, p, c in zip(grid, frame.placed, frame.canvas, strict=True)
        )
    height, width = word.split("x")
    return int(height), int(width)


def check_output_size(text: str) -> str:
    """``text`` in its normal form; UsageError when :func:`parse_output_size` cannot read it."""
    word = str(text).strip().lower().replace("×", "x")
    if word in ("image", "original"):
        return word
    ratio = re.fullmatch(r"x(\d{1,4}(?:\.\d{1,6})?)", word)
    if ratio and 1 <= float(ratio[1]) <= 256:
        return f"x{float(ratio[1]):g}"
    numbers = _numbers(word)
    if numbers and len(numbers) == 2 and all(1 <= n <= _MAX_SIDE for n in numbers):
        return f"{numbers[0]}x{numbers[1]}"
    raise UsageError(
        f"output size {text!r} is not understood: give image, original, HxW (448x672) or a ratio "
        "to the backbone's grid from x1 to x256 (x4)"
    )


def _numbers(word: str) -> list[int] | None:
    """``"448"`` -> [448], ``"448x672"`` -> [448, 672], anything else -> None."""
    if not re.fullmatch(r"[0-9]{1,9}([x×][0-9]{1,9})*", word):
        return None
    return [int(n) for n in re.split("[x×]", word)]


def _nearest(length: float, multiple: int) -> int:
    """The multiple nearest to ``length``, halves up, at least one."""
    return max(1, math.floor(length / multiple + 0.5)) * multiple
