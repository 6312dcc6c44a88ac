"""Pictures about classes: a legend, a mask over its photograph, a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from fmupsample.draw.heat import heat_colours
from fmupsample.draw.overlay import overlay
from fmupsample.draw.text import FAINT, INK, PAPER, draw_text, text_width

Colour = tuple[int, int, int]
_SIZE, _ROW, _MARGIN = 16, 26, 18
_MOST_ROWS = 24  # of a legend's column
_NUMBERS = 25  # classes up to which a confusion matrix has its shares written in


def palette_of(colours: Sequence[Colour], indices: Sequence[int]) -> np.ndarray:
    """uint8 ``[256, 3]``: the colour of each class at its index; grey elsewhere."""
    palette = np.full((256, 3), 128, np.uint8)
    palette[list(indices)] = np.array(colours, np.uint8)
    return palette


def mask_overlay(
    photo: np.ndarray, mask: np.ndarray, palette: np.ndarray, opacity: float = 0.55
) -> np.ndarray:
    """Colours of ``mask`` ``[H, W]`` over ``photo`` ``[H, W, 3]``, both uint8; dark contours."""
    mixed = overlay(photo, palette[mask], opacity)
    edge = np.zeros(mask.shape, bool)
    edge[:-1] |= mask[:-1] != mask[1:]
    edge[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    mixed[edge] = mixed[edge] // 3
    return mixed


def draw_legend(
    names: Sequence[str], colours: Sequence[Colour], indices: Sequence[int]
) -> np.ndarray:
    """Swatch, number and name of each class, in columns; uint8 ``[h, w, 3]``."""
    columns = -(-len(names) // _MOST_ROWS)
    rows = -(-len(names) // columns)
    digits = max(text_width(str(index), _SIZE) for index in indices)
    wide = min(320, max(text_width(name, _SIZE) for name in names))
    column = _ROW + 4 + digits + 12 + wide + _MARGIN
    sheet = Image.new("RGB", (columns * column + _MARGIN, rows * _ROW + 2 * _MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    for place, (name, index, colour) in enumerate(zip(names, indices, colours, strict=True)):
        x = _MARGIN + place // rows * column
        y = _MARGIN + place % rows * _ROW
        pen.rectangle((x, y + 3, x + _ROW - 6, y + _ROW - 4), fill=colour, outline=FAINT)
        middle, right = y + _ROW // 2, x + _ROW + 4 + digits
        draw_text(sheet, (right, middle), str(index), _SIZE, colour=FAINT, align="right")
        draw_text(sheet, (right + 12, middle), name, _SIZE, colour=INK, width=wide)
    return np.asarray(sheet)


def draw_confusion(matrix: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Counts ``[true, predicted]`` as shares of each true class; uint8 ``[h, w, 3]``."""
    count = len(names)
    cell = 44 if count <= _NUMBERS else max(6, 1100 // count)
    size = _SIZE if count <= _NUMBERS else max(8, min(_SIZE, cell))
    label = min(200, max(text_width(name, size) for name in names)) + 12
    side = count * cell
    total = matrix.sum(1, keepdims=True)
    shares = matrix / np.maximum(total, 1)
    colours = heat_colours(shares, 0, 1)
    colours[np.broadcast_to(total == 0, shares.shape)] = 235  # not in the ground truth
    blocks = colours.repeat(cell, 0).repeat(cell, 1)
    left, top = _MARGIN + label, _MARGIN + label + 30
    sheet = Image.new("RGB", (left + side + _MARGIN, top + side + _MARGIN), PAPER)
    sheet.paste(Image.fromarray(blocks), (left, top))
    title = "rows: true class, columns: predicted; shares of the true class"
    draw_text(sheet, (_MARGIN, _MARGIN), title, 14, colour=FAINT, width=sheet.width - 2 * _MARGIN)
    for n, name in enumerate(names):
        middle = n * cell + cell // 2
        draw_text(
            sheet, (left - 8, top + middle), name, size, colour=INK, width=label - 8, align="right"
        )
    across = Image.new("RGB", (label, side), PAPER)  # drawn level, then turned upright
    for n, name in enumerate(names):
        middle = n * cell + cell // 2
        draw_text(across, (8, middle), name, size, colour=INK, width=label - 8)
    sheet.paste(across.transpose(Image.Transpose.ROTATE_90), (left, top - label))
    if count <= _NUMBERS:
        for row, column in np.argwhere(shares >= 0.005):
            share = shares[row, column]
            place = (left + column * cell + cell // 2, top + row * cell + cell // 2)
            colour = INK if share > 0.6 else PAPER
            draw_text(sheet, place, f"{100 * share:.0f}", 14, colour=colour, align="middle")
    return np.asarray(sheet)
