"""What a run leaves to look at: a log, a curve, pictures of held-out features."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from fmupsample.analysis.pca import PCABasis
from fmupsample.atomic import replacing
from fmupsample.errors import OutputError
from fmupsample.render.panel import Tile, draw_panel
from fmupsample.render.text import FAINT, INK, PAPER, draw_text
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.classic import Bilinear

LOG, CURVE, PREVIEWS = "log.jsonl", "curve.png", "previews"


class Log:
    """One JSON object a line: ``{"step", "loss", ...}`` and, at validations, ``{"step", "held_out":
    {...}}``. Steps are counted as done: the first has number 1."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, step: int) -> None:
        """Keep what was written up to ``step``: the rest belongs to steps that are done again."""
        kept = [record for record in self.read() if record["step"] <= step]
        self._write("".join(json.dumps(record) + "\n" for record in kept), "w")

    def add(self, record: dict[str, Any]) -> None:
        """Append one record."""
        clean = {k: v if not _odd(v) else str(v) for k, v in record.items()}
        self._write(json.dumps(clean) + "\n", "a")

    def read(self) -> list[dict[str, Any]]:
        """All whole records; a last line that a kill cut off is left out."""
        if not self.path.is_file():
            return []
        records = []
        for line in self.path.read_text("utf-8", "replace").split("\n"):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
        return records

    def _write(self, text: str, mode: str) -> None:
        try:
            with self.path.open(mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise OutputError(
                f"the log {self.path} cannot be written: {error.strerror or error}"
            ) from error


def _odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


# --- the curve ------------------------------------------------------------------------------------

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 960, 300, 90, 24, 40, 34
_LOSS, _HEAD, _GRID = (150, 160, 175), (30, 96, 180), (225, 226, 230)


def draw_curve(records: Sequence[dict[str, Any]], steps: int) -> np.ndarray:
    """The training loss and the held-out loss (bilinear interpolation is 1) over the steps.

    Returns:
        uint8 ``[H, W, 3]``.
    """
    loss = [(r["step"], r["loss"]) for r in records if isinstance(r.get("loss"), int | float)]
    held = [(r["step"], r["held_out"]["vs_bilinear"]) for r in records if "held_out" in r]
    sheet = Image.new("RGB", (_WIDTH, 2 * _HEIGHT), PAPER)
    _draw_axes(sheet, 0, "training loss", [loss, _smoothed(loss)], [_LOSS, _HEAD], steps, None)
    title = "held-out loss, as a share of bilinear interpolation's"
    _draw_axes(sheet, _HEIGHT, title, [held], [_HEAD], steps, 1.0)
    return np.asarray(sheet)


def _smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    reach = max(1, len(points) // 40)
    values = [value for _, value in points]
    return [
        (step, float(np.mean(values[max(0, i - reach) : i + reach + 1])))
        for i, (step, _) in enumerate(points)
    ]


def _draw_axes(
    sheet: Image.Image,
    top: int,
    title: str,
    lines: list[list[tuple[int, float]]],
    colours: list[tuple[int, int, int]],
    steps: int,
    reference: float | None,
) -> None:
    """One diagram: ``lines`` of (step, value) below ``top``, a dashed line at ``reference``."""
    draw = ImageDraw.Draw(sheet)
    values = [value for line in lines for _, value in line]
    if reference is not None:
        values = [*values, reference]
    draw_text(sheet, (_LEFT, top + _TOP // 2), title, 17)
    if not values:
        return
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - margin, high + margin
    bottom, ceiling = top + _HEIGHT - _BOTTOM, top + _TOP

    def place(step: float, value: float) -> tuple[float, float]:
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / steps
        return x, bottom - (bottom - ceiling) * (value - low) / (high - low)

    for value in _ticks(low, high):
        y = place(0, value)[1]
        draw.line([(_LEFT, y), (_WIDTH - _RIGHT, y)], fill=_GRID)
        draw_text(sheet, (_LEFT - 10, round(y)), f"{value:g}", 14, colour=FAINT, align="right")
    for step in _ticks(0, steps):
        at = (round(place(step, low)[0]), bottom + _BOTTOM // 2)
        draw_text(sheet, at, f"{step:g}", 14, colour=FAINT, align="middle")
    if reference is not None:
        y = place(0, reference)[1]
        for x in range(_LEFT, _WIDTH - _RIGHT, 12):
            draw.line([(x, y), (x + 6, y)], fill=INK, width=2)
    for line, colour in zip(lines, colours, strict=True):
        points = [place(*point) for point in line]
        if len(points) > 1:
            draw.line(points, fill=colour, width=3 if colour == _HEAD else 1, joint="curve")
        if len(points) < 20:
            for x, y in points:
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between ``low`` and ``high``."""
    raw = (high - low) / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step)
    return [round(n * step, 12) for n in range(first, math.floor(high / step) + 1)]


# --- the previews ---------------------------------------------------------------------------------


@torch.no_grad()
def draw_preview(
    pixels: np.ndarray,
    image: torch.Tensor,
    features: torch.Tensor,
    head: Upsampler,
    basis: PCABasis,
    note: str,
) -> np.ndarray:
    """A panel: the picture, its features upsampled bilinearly, and by the head, as PCA colours.

    Args:
        pixels: uint8 ``[H, W, 3]``.
        image: the same, normalised, ``[1, 3, H, W]``; features: ``[1, C, h, w]``.
    """
    scores = basis.apply(features)
    plain = Bilinear()(scores, size=image.shape[-2:])
    if head.linear_in_value:
        sharp = head.reassemble(head.kernels(features, image), scores)
    else:
        sharp = basis.apply(head(features, image))
    tiles = [
        Tile("Picture", pixels),
        Tile("Bilinear", basis.to_rgb(plain[0])),
        Tile(head.name, basis.to_rgb(sharp[0])),
    ]
    return draw_panel(tiles, note=note, columns=3).pixels


def save_picture(path: Path, pixels: np.ndarray) -> None:
    """Write a PNG.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            Image.fromarray(pixels).save(temporary, format="png")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
