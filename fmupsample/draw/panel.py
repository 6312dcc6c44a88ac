"""A labelled panel: tiles of one size side by side, a line of text above each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from fmupsample.draw.text import FAINT, INK, PAPER, draw_text, text_width
from fmupsample.errors import ShapeError

Box = tuple[int, int, int, int]  # left, top, width, height in pixels

_ASPECT = 2.2  # width over height of the whole panel that the arrangement aims at
_FLATTEST = 96  # no tile lower or narrower than this: thin strips are centred on grey


@dataclass(frozen=True)
class Tile:
    """One picture of a panel.

    Attributes:
        label: the words above it.
        pixels: uint8 ``[H, W, 3]``.
        note: smaller and paler words after the label, left out where there is no room.
    """

    label: str
    pixels: np.ndarray
    note: str = ""


@dataclass(frozen=True)
class Panel:
    """A drawn panel.

    Attributes:
        pixels: uint8 ``[H, W, 3]``.
        boxes: where each tile's pixels lie in it, in the order of the tiles.
    """

    pixels: np.ndarray
    boxes: list[Box] = field(default_factory=list)


def columns_for(count: int, height: int, width: int) -> int:
    """How many tiles of this size to set in a row: what brings the panel nearest to 2.2 : 1."""

    def off(columns: int) -> float:
        rows = math.ceil(count / columns)
        return abs(math.log(columns * width / (rows * height) / _ASPECT))

    return min((n for n in range(1, count + 1) if count % n == 0), key=off)


def draw_panel(
    tiles: Sequence[Tile],
    *,
    caption: str = "",
    note: str = "",
    footer: np.ndarray | None = None,
    columns: int | None = None,
) -> Panel:
    """Arrange ``tiles`` (all of one size) with labels above, and a caption line below.

    Args:
        tiles: at least one.
        caption: bottom left, shortened from its start where it is too long (a path).
        note: bottom right, pale.
        footer: a small picture set at the bottom right instead of ``note`` (a colour bar).
        columns: tiles in a row; by default what suits their shape.

    Raises:
        ShapeError: no tiles, or tiles of several sizes.
    """
    shapes = {tile.pixels.shape for tile in tiles}
    if len(shapes) != 1:
        raise ShapeError(f"the tiles of a panel need one size; got {sorted(shapes)}")
    height, width = tiles[0].pixels.shape[:2]
    columns = columns or columns_for(len(tiles), height, width)
    rows = math.ceil(len(tiles) / columns)

    # Everything in proportion to the tile, so that a panel scaled down stays legible.
    cell_height, cell_width = max(height, _FLATTEST), max(width, 2 * _FLATTEST)
    unit = min(max(round((cell_height * cell_width) ** 0.5 / 26), 14), 30)  # the letter size
    longest = max(text_width(tile.label, unit) for tile in tiles)
    if longest > cell_width and longest:
        unit = max(11, int(unit * cell_width / longest))
    gap, margin = round(unit * 0.7), unit
    label_height = round(unit * 1.75)
    has_caption = bool(caption or note or footer is not None)
    foot = footer.shape[0] if footer is not None else 0
    caption_height = max(round(unit * 1.5), foot + gap // 2) if has_caption else 0

    total_width = 2 * margin + columns * cell_width + (columns - 1) * gap
    row_height = label_height + cell_height
    total_height = (
        rows * row_height + (rows - 1) * gap + (gap + caption_height if has_caption else 0)
        + margin + margin // 2
    )  # fmt: skip
    # One number, for paper has no colour: three take three times as long.
    sheet = np.full((total_height, total_width, 3), PAPER[0], np.uint8)
    boxes: list[Box] = []
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        left = margin + column * (cell_width + gap)
        top = margin // 2 + row * (row_height + gap)
        line = _label(tile, unit, (label_height, cell_width))
        sheet[top : top + label_height, left : left + cell_width] = line
        x = left + (cell_width - width) // 2
        y = top + label_height + (cell_height - height) // 2
        sheet[y : y + height, x : x + width] = tile.pixels
        boxes.append((x, y, width, height))
    if has_caption:
        top = total_height - margin // 2 - caption_height
        room = (caption_height, total_width - 2 * margin)
        line = _caption(caption, note, footer, round(unit * 0.85), gap, room)
        sheet[top : top + caption_height, margin : total_width - margin] = line
    return Panel(sheet, boxes)


# Text is drawn on lines of its own: a whole panel would be copied into Pillow's form and back.


def _label(tile: Tile, unit: int, size: tuple[int, int]) -> np.ndarray:
    """The line above a tile: its label in letters of ``unit`` pixels, its note where it fits."""
    height, width = size
    line = Image.new("RGB", (width, height), PAPER)
    draw_text(line, (0, height // 2), tile.label, unit, width=width)
    used = text_width(tile.label, unit) + round(unit * 0.7)
    small = round(unit * 0.78)
    if tile.note and used + text_width(tile.note, small) <= width:
        draw_text(line, (used, height // 2 + 1), tile.note, small, colour=FAINT)
    return np.asarray(line)


def _caption(
    caption: str, note: str, footer: np.ndarray | None, unit: int, gap: int, size: tuple[int, int]
) -> np.ndarray:
    """The line below all tiles: the caption, and a picture or words at its right end."""
    height, width = size
    line = Image.new("RGB", (width, height), PAPER)
    middle = height // 2 - gap // 3
    right = 0
    if footer is not None:
        line.paste(
            Image.fromarray(footer), (width - footer.shape[1], middle - footer.shape[0] // 2)
        )
        right = footer.shape[1] + gap
    elif note and text_width(note, unit) <= width:
        draw_text(line, (width, middle), note, unit, colour=FAINT, align="right")
        right = text_width(note, unit) + gap
    draw_text(line, (0, middle), caption, unit, colour=INK, width=width - right, keep="end")
    return np.asarray(line)
