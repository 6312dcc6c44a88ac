"""Drawing videos: every frame's features, in one basis of colours, as a video.

Nothing of a picture is chosen anew for a frame, or the video would flicker: the basis is fitted on
frames spread over all that is drawn, and similarity is to the feature of the first frame, on the
scale of the first frame.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fmupsample.analysis.pca import PCABasis, sample_tokens
from fmupsample.errors import FmupsampleError, ImageError
from fmupsample.images.arrays import resize
from fmupsample.images.find import Source, printable
from fmupsample.pipeline import Item
from fmupsample.progress import Progress
from fmupsample.render.heat import colour_bar, heat_colours, mark_point
from fmupsample.render.overlay import grey, overlay
from fmupsample.render.panel import Tile, draw_panel
from fmupsample.video.clips import Clip
from fmupsample.video.frames import FrameReader, FrameSource
from fmupsample.video.span import show_time
from fmupsample.video.write import VideoFile
from fmupsample.visualization.album import Album
from fmupsample.visualization.draw import (
    HEAT_OPACITY,
    Artist,
    Drawing,
    Point,
    colours,
    heat_range,
    letter_size,
)
from fmupsample.visualization.passes import Saver

# Of a video, so many frames at most, evenly spaced, stand for all when a basis is fitted.
BASIS_FRAMES = 32


def spread(frames: Sequence[FrameSource]) -> list[FrameSource]:
    """Those that a basis is fitted on."""
    return list(frames[:: max(1, -(-len(frames) // BASIS_FRAMES))])


class FilmArtist(Artist):
    """Draws frames as :class:`Artist` draws pictures; panels are the picture and one map."""

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


class Filming:
    """Draws a video.

    Args:
        artist: of the run's options.
        album: has names for the video's results.
    """

    def __init__(self, artist: FilmArtist, album: Album, progress: Progress) -> None:
        self.artist, self.album, self.progress = artist, album, progress
        self.steps = 0  # frames that progress has heard of

    def _advance(self) -> None:
        self.steps += 1
        self.progress.advance()

    def own_basis(self, frames: Sequence[FrameSource]) -> PCABasis:
        """The basis of one video by itself.

        Raises:
            ImageError: a frame cannot be read.
        """
        tokens = []
        for item in self.artist.pipeline.items(spread(frames), on_error=_stop):
            found = self.artist.basis_tokens(item)
            tokens.append(sample_tokens(found.T[:, :, None], 2000).cpu())
            self._advance()
        return PCABasis.fit(torch.cat(tokens))

    def draw(
        self,
        clip: Clip,
        frames: Sequence[FrameSource],
        basis: PCABasis | None,
        wanted: dict[Point | None, str],
    ) -> list[Path]:
        """Draw a video, in one pass over its frames.

        Args:
            basis: ``None``: it has its own.
            wanted: what to draw (``None``: the PCA) and its recipe.

        Returns:
            The files, in the order of ``wanted``.

        Raises:
            FmupsampleError: it cannot be drawn; there is no file then.
            KeyboardInterrupt: the same.
        """
        files: dict[Point | None, VideoFile] = {}
        paths = []
        try:
            with contextlib.ExitStack() as stack:
                for point, recipe in wanted.items():
                    film = self.album.film(clip.source, recipe, point)
                    temporary, path = stack.enter_context(film)
                    files[point] = stack.enter_context(VideoFile(temporary, clip.rate))
                    paths.append(path)
                if basis is None and None in wanted:
                    basis = self.own_basis(frames)
                stack.callback(self.artist.close)
                self._fill(files, frames, basis)
        except KeyboardInterrupt:
            name = printable(clip.source.relative)
            self.progress.warn(
                f"stopped: the video of {name} is not finished, and the same command draws it "
                "from its start; what was finished before is kept"
            )
            raise
        return paths

    def _fill(
        self,
        files: dict[Point | None, VideoFile],
        frames: Sequence[FrameSource],
        basis: PCABasis | None,
    ) -> None:
        looks: dict[Point, Look] = {}

        def save(source: Source, drawing: Drawing, point: Point | None) -> Path:
            files[point].add(drawing.pixels)
            return files[point].path

        def saved(source: Source, result: Path | FmupsampleError) -> None:
            if isinstance(result, FmupsampleError):
                raise result

        items = self.artist.pipeline.items(frames, on_error=_stop)
        with contextlib.closing(items), Saver(save, saved) as saver:
            for item in items:
                for point in files:
                    if point is None:
                        assert basis is not None
                        drawing = self.artist.draw_pca(item, basis)
                    else:
                        first = point not in looks
                        if first:
                            looks[point] = self.artist.look(item, point)
                        drawing = self.artist.similarity(item, looks[point], first=first)
                    saver.put(item.source, drawing, point)
                self._advance()


def check_point(clip: Clip, point: Point) -> None:
    """Raise an ImageError for a point outside the frames of a video."""
    height, width = clip.size
    if point.x >= width or point.y >= height:
        raise ImageError(
            f"{clip.source}: point {point} lies outside the video, which is {width} pixels wide "
            f"and {height} high"
        )


def _stop(source: Source, error: FmupsampleError) -> None:
    raise error


def _caption(item: Item) -> str:
    source = item.source
    assert isinstance(source, FrameSource)
    time = show_time(source.time)
    whole = f"{time}." if "." not in time else time
    return f"{printable(source.path.name)}, {whole:0<10}"  # of one width
