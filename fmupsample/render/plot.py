"""What plots are drawn with: colours, lines, dots and text, smooth because drawn larger."""

from __future__ import annotations

from PIL import Image, ImageDraw

from fmupsample.render.text import PAPER, font

GRID, AXIS = (232, 232, 236), (150, 150, 158)
# Colours that stay apart for colour-blind readers (Okabe and Ito).
COLOURS = [(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233)]
GREYS = [(90, 90, 98), (160, 160, 168)]

SCALE = 3  # drawn larger and shrunk: smooth lines


def blank(width: int, height: int) -> Image.Image:
    """An empty canvas to draw on, which :func:`finished` brings to this size."""
    return Image.new("RGB", (width * SCALE, height * SCALE), PAPER)


def finished(canvas: Image.Image) -> Image.Image:
    size = (canvas.width // SCALE, canvas.height // SCALE)
    return canvas.resize(size, Image.Resampling.LANCZOS)


class Draw:
    """Lines, dots and text in unscaled coordinates."""

    def __init__(self, canvas: Image.Image):
        self.draw = ImageDraw.Draw(canvas)

    def line(self, points: list[tuple[float, float]], colour: tuple, width: float) -> None:
        if len(points) > 1:
            scaled = [(x * SCALE, y * SCALE) for x, y in points]
            self.draw.line(scaled, fill=colour, width=max(1, round(width * SCALE)), joint="curve")

    def dot(self, at: tuple[float, float], colour: tuple, radius: float = 4) -> None:
        (x, y), r = (c * SCALE for c in at), radius * SCALE
        self.draw.ellipse((x - r, y - r, x + r, y + r), fill=colour, outline=PAPER, width=SCALE)

    def text(
        self, at: tuple[float, float], text: str, size: int, colour: tuple, anchor: str = "left"
    ) -> None:
        shift = {"left": 0, "middle": 0.5, "right": 1}[anchor]
        face = font(size * SCALE)
        x = at[0] * SCALE - shift * face.getlength(text)
        self.draw.text((x, at[1] * SCALE), text, fill=colour, font=face)


def seconds(value: float) -> str:
    """A round number of seconds in its usual unit."""
    for unit, factor in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 0.999:
            return f"{value * factor:g} {unit}"
    return f"{value:g} s"
