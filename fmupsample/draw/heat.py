"""Heat maps: numbers as colours over a photograph, a marker, and a scale to read them by."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from fmupsample.draw.text import INK, PAPER, draw_text, text_width

# Dark violet over red and orange to pale yellow; lightness rises steadily, so that the map also
# reads in grey and for colour-blind eyes.
_STOPS = np.array(
    [
        (0.00, 8, 6, 30),
        (0.15, 45, 17, 92),
        (0.30, 98, 26, 110),
        (0.45, 150, 42, 98),
        (0.60, 203, 65, 72),
        (0.72, 235, 104, 40),
        (0.84, 250, 160, 20),
        (0.93, 247, 208, 65),
        (1.00, 252, 252, 178),
    ],
    dtype=np.float32,
)


def heat_colours(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """``values`` ``[H, W]`` as uint8 ``[H, W, 3]``: dark at ``low``, pale yellow at ``high``."""
    unit = np.clip((values.astype(np.float32) - low) / max(high - low, 1e-9), 0, 1)
    unit = np.nan_to_num(unit, nan=0.0)
    channels = [np.interp(unit, _STOPS[:, 0], _STOPS[:, 1 + c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def mark_point(pixels: np.ndarray, x: float, y: float) -> np.ndarray:
    """A copy of ``pixels`` with a ring and cross around ``(x, y)``, which itself stays visible.

    Black inside white, so that it shows on any ground.
    """
    height, width = pixels.shape[:2]
    radius = min(max(round(min(height, width) / 42), 6), 18)
    # Drawn four times as large and scaled down: Pillow's lines have no antialiasing. Only around
    # the point, for the picture may be large.
    scale, pad = 4, radius * 3
    left, top = int(x) - pad, int(y) - pad
    box = Image.new("L", (2 * pad * scale, 2 * pad * scale), 0)
    wide = box.copy()
    centre = ((x - left) * scale, (y - top) * scale)
    for canvas, line in ((wide, radius * 0.42), (box, radius * 0.2)):
        draw = ImageDraw.Draw(canvas)
        thick = max(1, round(line * scale))
        r = radius * scale + thick / 2
        draw.ellipse(
            (centre[0] - r, centre[1] - r, centre[0] + r, centre[1] + r), outline=255, width=thick
        )
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            start, end = radius * 1.0 * scale, radius * 1.9 * scale
            draw.line(
                (centre[0] + dx * start, centre[1] + dy * start,
                 centre[0] + dx * end, centre[1] + dy * end),
                fill=255, width=thick,
            )  # fmt: skip
    picture = Image.fromarray(pixels.copy())
    small = (2 * pad, 2 * pad)
    for canvas, colour in ((wide, (255, 255, 255)), (box, (0, 0, 0))):
        mask = canvas.resize(small, Image.Resampling.BOX)
        picture.paste(Image.new("RGB", small, colour), (left, top), mask)
    return np.asarray(picture)


def colour_bar(low: float, high: float, *, width: int, size: int) -> np.ndarray:
    """The scale of a heat map: a strip with its two ends in numbers, uint8 ``[h, w, 3]``.

    Args:
        width: of the strip alone, pixels.
        size: of the letters, pixels.
    """
    left, right = f"{low:.2f}", f"{high:.2f}"
    gap = round(size * 0.5)
    first, last = text_width(left, size), text_width(right, size)
    height = round(size * 1.3)
    sheet = Image.new("RGB", (first + last + 2 * gap + width, height), PAPER)
    strip = np.repeat(np.linspace(0, 1, width, dtype=np.float32)[None], round(size * 0.8), axis=0)
    top = (height - strip.shape[0]) // 2
    sheet.paste(Image.fromarray(heat_colours(strip, 0, 1)), (first + gap, top))
    draw_text(sheet, (0, height // 2), left, size, colour=INK)
    draw_text(sheet, (sheet.width, height // 2), right, size, colour=INK, align="right")
    return np.asarray(sheet)
