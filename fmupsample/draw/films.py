"""Drawing the frames of a video: the photograph and one map.

Nothing is chosen anew for a frame, or the video would flicker: similarity is to the feature of the
first frame, on the scale of the first frame.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fmupsample.draw.heat import colour_bar, heat_colours, mark_point
from fmupsample.draw.overlay import grey, overlay
from fmupsample.draw.panel import Tile, draw_panel
from fmupsample.draw.pca import PCABasis
from fmupsample.draw.renderer import (
    HEAT_OPACITY,
    Drawing,
    Point,
    Renderer,
    colours,
    heat_range,
    letter_size,
)
from fmupsample.errors import ImageError
from fmupsample.images.arrays import resize
from fmupsample.images.find import Source, printable
from fmupsample.pipeline import Item
from fmupsample.video.frames import FrameReader, FrameSource
from fmupsample.video.span import show_time


class FilmRenderer(Renderer):
    """Draws frames as :class:`.Renderer` draws pictures; panels are the picture and one map."""

    @functools.cached_property
    def _shown(self) -> _Shown:
        return _Shown()

    def _photo(self, item: Item, size: tuple[int, int]) -> np.ndarray:
        height, original = item.frame.placed[0], item.frame.original[0]
        if size[0] > height * 1.05 and original > height * 1.05:
            with contextlib.suppress(ImageError):
                return resize(self._shown.pixels(item.source), size)
        return super()._photo(item, size)

    def close(self) -> None:
        """Close the video."""
        self._shown.reader.close()

    def _panel(self, item: Item, basis: PCABasis, low: Tensor, high: Tensor) -> Drawing:
        size = self._tile_size(item)
        height, width = high.shape[-2:]
        sharp = resize(colours(basis, high), size)
        tiles = [
            Tile("Video", self._photo(item, size)),
            Tile(self.title, sharp, f"{height} x {width}"),
        ]
        panel = draw_panel(tiles, caption=_caption(item), note=self.note, columns=2)
        return Drawing(panel.pixels)

    def similarity(self, item: Item, look: Look, *, first: bool) -> Drawing:
        """How alike the frame is to what was looked at; that is marked in the first frame."""
        _, high = self.similarities(item, [], look.query[None])
        size = self._tile_size(item)
        photo = self._photo(item, size)
        heat = resize(heat_colours(high[0].cpu().numpy(), *look.range), size)
        drawn = overlay(grey(photo), heat, HEAT_OPACITY)
        if first:
            x, y = (
                centre * n / placed
                for centre, n, placed in zip(
                    look.centre, size[::-1], item.frame.placed[::-1], strict=True
                )
            )
            photo, drawn = mark_point(photo, x, y), mark_point(drawn, x, y)
        bar = colour_bar(*look.range, width=min(220, size[1] // 2), size=letter_size(size))
        tiles = [
            Tile("Video", photo, f"{look.point} of the first frame"),
            Tile(f"Similarity, upsampled: {self.title}", drawn),
        ]
        panel = draw_panel(tiles, caption=_caption(item), footer=bar, columns=2)
        return Drawing(panel.pixels)

    def look(self, item: Item, point: Point) -> Look:
        """The feature at ``point``, and the range of similarities to it in this frame."""
        centre = point.centre(item)
        query = self._features_at(item, [centre])[0]
        _, high = self.similarities(item, [], query[None])
        return Look(point, centre, query, heat_range(high[0].cpu().numpy()))


@dataclass(frozen=True)
class Look:
    """What the frames of a video are compared with.

    Attributes:
        centre: ``(x, y)`` of the point on the canvas of the first frame.
        query: ``[C]``.
        range: similarities drawn in the first and the last colour.
    """

    point: Point
    centre: tuple[float, float]
    query: Tensor
    range: tuple[float, float]


class _Shown:
    """The frame that is drawn, at its own size; frames are asked for in order, some repeatedly."""

    def __init__(self) -> None:
        self.reader = FrameReader()
        self._source: Source | None = None
        self._pixels = np.empty(0)

    def pixels(self, source: Source) -> np.ndarray:
        if source != self._source:
            [_] = self.reader.watch([source])
            self._pixels, _ = self.reader.read(source)
            self._source = source
        return self._pixels


def _caption(item: Item) -> str:
    source = item.source
    assert isinstance(source, FrameSource)
    time = show_time(source.time)
    whole = f"{time}." if "." not in time else time
    return f"{printable(source.path.name)}, {whole:0<10}"  # of one width
