"""A labelled panel: tiles of one size side by side, a line of text above each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from fmupsample.errors import ShapeError
from fmupsample.render.text import FAINT, INK, PAPER, draw_text, text_width

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
    sheet = Image.new("RGB", (total_width, total_height), PAPER)
    boxes: list[Box] = []
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        left = margin + column * (cell_width + gap)
        top = margin // 2 + row * (row_height + gap)
        middle = top + label_height // 2
        draw_text(sheet, (left, middle), tile.label, unit, width=cell_width)
        used = text_width(tile.label, unit) + round(unit * 0.7)
        small = round(unit * 0.78)
        if tile.note and used + text_width(tile.note, small) <= cell_width:
            draw_text(sheet, (left + used, middle + 1), tile.note, small, colour=FAINT)
        x = left + (cell_width - width) // 2
        y = top + label_height + (cell_height - height) // 2
        sheet.paste(Image.fromarray(tile.pixels), (x, y))
        boxes.append((x, y, width, height))
    if has_caption:
        small = round(unit * 0.85)
        middle = total_height - margin // 2 - caption_height // 2 - gap // 3
        room = total_width - 2 * margin
        right = 0
        if footer is not None:
            sheet.paste(
                Image.fromarray(footer),
                (total_width - margin - footer.shape[1], middle - footer.shape[0] // 2),
            )
            right = footer.shape[1] + gap
        elif note and text_width(note, small) <= room:
            draw_text(
                sheet, (total_width - margin, middle), note, small, colour=FAINT, align="right"
            )
            right = text_width(note, small) + gap
        draw_text(
            sheet, (margin, middle), caption, small, colour=INK, width=room - right, keep="end"
        )
    return Panel(np.asarray(sheet), boxes)
