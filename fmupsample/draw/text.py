"""Text on pictures: one typeface (Pillow's own, so nothing to install), fitted to a width."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

INK = (38, 38, 42)
FAINT = (118, 118, 126)
PAPER = (255, 255, 255)


@lru_cache(maxsize=16)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's built-in typeface at ``size`` pixels (its bitmap font where FreeType is missing)."""
    try:
        return ImageFont.load_default(size)
    except (TypeError, OSError, ImportError):
        return ImageFont.load_default()


_PLAIN = str.maketrans(
    {"×": "x", "–": "-", "—": "-", "ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "Ø": "O", "ł": "l"}
)


def plain(text: str) -> str:
    """``text`` in letters that the typeface has: accents dropped, other scripts as ``?``."""
    if text.isascii():
        return text
    apart = unicodedata.normalize("NFKD", text.translate(_PLAIN))
    return "".join(
        letter if letter.isascii() or letter in "…°·" else "?"
        for letter in apart
        if not unicodedata.combining(letter)
    )


def text_width(text: str, size: int) -> int:
    """Width of ``text`` in pixels."""
    return round(font(size).getlength(text))


def fit(text: str, size: int, width: int, *, keep: str = "start") -> str:
    """``text``, shortened with an ellipsis where it is wider than ``width`` pixels.

    Args:
        keep: which part stays: ``"start"``, or ``"end"`` (of a path, the end says more).
    """
    text = plain(" ".join(text.split()))
    if text_width(text, size) <= width:
        return text
    # Bisect the number of characters kept; widths grow with it.
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        candidate = _shortened(text, middle, keep)
        low, high = (middle, high) if text_width(candidate, size) <= width else (low, middle - 1)
    return _shortened(text, low, keep) if low else ""


def _shortened(text: str, count: int, keep: str) -> str:
    if keep == "end":
        return "…" + text[len(text) - count :].lstrip()
    return text[:count].rstrip() + "…"


def draw_text(
    picture: Image.Image,
    where: tuple[int, int],
    text: str,
    size: int,
    *,
    colour: tuple[int, int, int] = INK,
    width: int | None = None,
    keep: str = "start",
    align: str = "left",
) -> None:
    """Write one line on ``picture``; ``where`` is its left (or right) edge and vertical middle.

    Args:
        width: shorten the text to this many pixels.
        align: ``"left"``, ``"middle"`` or ``"right"``: which point of the line ``where`` is.
    """
    text = plain(text) if width is None else fit(text, size, width, keep=keep)
    if not text:
        return
    draw = ImageDraw.Draw(picture)
    anchor = {"left": "lm", "middle": "mm", "right": "rm"}[align]
    try:
        draw.text(where, text, font=font(size), fill=colour, anchor=anchor)
    except (ValueError, UnicodeEncodeError):  # the bitmap font knows neither anchors nor "…"
        text = text.replace("…", "..")
        shift = {"left": 0.0, "middle": 0.5, "right": 1.0}[align] * font(size).getlength(text)
        draw.text((where[0] - shift, where[1] - 6), text, font=font(size), fill=colour)
