"""Contact sheets: every photograph of a run with its colours beside it, in justified rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fmupsample.draw.text import FAINT, INK, PAPER, draw_text
from fmupsample.images.arrays import resize
from fmupsample.prefetch import prefetch
from fmupsample.threads import compute_alone, cores

PER_PAGE = 48

_WIDTH = 1680
_MARGIN, _GAP = 24, 18
_SEAM = 2  # between a photograph and its colours
FEW = 8  # pictures of which a sheet shows large ones
_ROW = 190  # height of a row that the arrangement aims at, and the most for a large run
_ROW_FEW = 340  # the same for a handful of pictures
_TEXT = 15
_FLATTEST, _TALLEST = 6.0, 0.35  # aspect ratios beyond which a thumbnail is cut at its sides


@dataclass(frozen=True)
class Entry:
    """One picture of a sheet.

    Attributes:
        name: written under it.
        size: ``(H, W)``, for its aspect ratio.
        load: gives the photograph and its colours, uint8 ``[H, W, 3]``; called once, when drawn.
    """

    name: str
    size: tuple[int, int]
    load: Callable[[], tuple[np.ndarray, np.ndarray]]

    @property
    def aspect(self) -> float:
        """Width over height, within the limits of a thumbnail."""
        return min(max(self.size[1] / self.size[0], _TALLEST), _FLATTEST)


def draw_sheet(entries: Sequence[Entry], *, title: str = "", note: str = "") -> np.ndarray:
    """One page: uint8 ``[H, 1680, 3]`` (narrower when the pictures do not fill a row)."""
    target = _ROW_FEW if len(entries) <= FEW else _ROW
    rows = justify([2 * entry.aspect for entry in entries], _WIDTH - 2 * _MARGIN, target)
    label = _TEXT + 12
    top = _MARGIN + (40 if title or note else 0)
    height = top + sum(row_height + label + _GAP for _, row_height in rows) - _GAP + _MARGIN
    used = max(
        (sum(round(2 * entries[i].aspect * h) for i in row) + _GAP * (len(row) - 1))
        for row, h in rows
    )
    width = max(min(_WIDTH, used + 2 * _MARGIN), 420)
    sheet = Image.new("RGB", (width, height), PAPER)
    if title:
        draw_text(sheet, (_MARGIN, _MARGIN + 10), title, 22, colour=INK, width=width - 120)
    if note:
        draw_text(sheet, (width - _MARGIN, _MARGIN + 10), note, 16, colour=FAINT, align="right")
    places: list[tuple[Entry, int, int, int, int]] = []  # left, right, top, height
    y = top
    for row, row_height in rows:
        x = float(_MARGIN)
        for index in row:
            pair = 2 * entries[index].aspect * row_height
            places.append((entries[index], round(x), round(x + pair), y, row_height))
            x += pair + _GAP
        y += row_height + label + _GAP
    workers = min(4, cores())
    for place, thumbnails, error in prefetch(
        _thumbnails, places, workers=workers, ahead=workers, begin=compute_alone
    ):
        if error is not None:
            raise error
        entry, left, right, y, row_height = place
        for n, thumbnail in enumerate(thumbnails):
            x = left + n * (thumbnail.shape[1] + _SEAM)
            sheet.paste(Image.fromarray(thumbnail), (x, y))
        draw_text(
            sheet, (left, y + row_height + label // 2), entry.name, _TEXT,
            colour=FAINT, width=right - left, keep="end",
        )  # fmt: skip
    return np.asarray(sheet)


def _thumbnails(place: tuple[Entry, int, int, int, int]) -> list[np.ndarray]:
    """The photograph and its colours at the size that they have on the sheet."""
    entry, left, right, _, height = place
    half = max((right - left - _SEAM) // 2, 1)
    return [_cut(pixels, (height, half)) for pixels in entry.load()]


def justify(aspects: Sequence[float], width: int, target: int) -> list[tuple[list[int], int]]:
    """Break pictures of these aspect ratios into rows that fill ``width``.

    Returns:
        ``(indices, height)`` of each row; a row that is not full keeps about the target height.
    """
    rows: list[tuple[list[int], int]] = []
    row: list[int] = []
    total = 0.0
    for index, aspect in enumerate(aspects):
        without = (width - _GAP * max(len(row) - 1, 0)) / total if row else float("inf")
        within = (width - _GAP * len(row)) / (total + aspect)
        # Break where the row without this picture is nearer to the target than the one with it.
        if row and within < target and abs(without - target) < abs(within - target):
            rows.append((row, round(without)))
            row, total = [], 0.0
        row.append(index)
        total += aspect
    if row:
        full = (width - _GAP * (len(row) - 1)) / total
        rows.append((row, max(1, round(min(full, target * 1.15)))))
    return rows


def _cut(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``pixels`` cut centrally to the aspect ratio of ``size``, then scaled to it."""
    height, width = pixels.shape[:2]
    keep_height = max(1, min(height, round(width * size[0] / size[1])))
    keep_width = max(1, min(width, round(height * size[1] / size[0])))
    top, left = (height - keep_height) // 2, (width - keep_width) // 2
    return resize(
        np.ascontiguousarray(pixels[top : top + keep_height, left : left + keep_width]), size
    )
