"""From one picture's features to drawn pictures of them: PCA colours, similarity to a point.

Everything is projected at low resolution and upsampled after (three scores, one similarity, one
foreground score), which is exact for upsamplers that are linear in their values; the map of all
channels is never built.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fmupsample.draw.foreground import Split, opacity
from fmupsample.draw.heat import colour_bar, heat_colours, mark_point
from fmupsample.draw.overlay import darken, grey, overlay, pca_overlay
from fmupsample.draw.panel import Box, Tile, draw_panel
from fmupsample.draw.pca import PCABasis
from fmupsample.draw.similarity import features_at, similarity_maps
from fmupsample.draw.tiles import blocks, tile_size
from fmupsample.errors import FmupsampleError, ImageError, UsageError
from fmupsample.finite import check_finite
from fmupsample.images.arrays import resize
from fmupsample.images.read import read_picture
from fmupsample.images.size import parse_output_size
from fmupsample.pipeline import Item, Pipeline
from fmupsample.upsamplers.registry import METHODS

Layout = Literal["panel", "single", "overlay"]
LAYOUTS: tuple[Layout, ...] = ("panel", "single", "overlay")

HEAT_OPACITY = 0.72
_SAME_SHAPE = 0.015  # by how much sides may differ: seven pixels of 448


@dataclass(frozen=True)
class Drawing:
    """A finished picture.

    Attributes:
        pixels: uint8 ``[H, W, 3]``.
        photo, colours: where the photograph and the upsampled colours lie in it (left, top, width,
            height); ``None`` for what it does not hold. The contact sheet is cut from these.
    """

    pixels: np.ndarray
    photo: Box | None = None
    colours: Box | None = None


@dataclass(frozen=True)
class Point:
    """A pixel of the original picture, counted from 0 at the top left."""

    x: float
    y: float

    @classmethod
    def parse(cls, text: str) -> Point:
        """From ``"X,Y"``.

        Raises:
            UsageError: anything else.
        """
        try:
            x, y = (float(part) for part in text.split(","))
        except ValueError:
            x = y = float("nan")
        if not (0 <= x < 1e6 and 0 <= y < 1e6):
            raise UsageError(
                f"point {text!r} is not understood: give X,Y in pixels of the original picture, "
                "counted from 0 at the top left, such as 320,240"
            )
        return cls(x, y)

    def __str__(self) -> str:
        return f"{self.x:g},{self.y:g}"

    def centre(self, item: Item) -> tuple[float, float]:
        """The middle of this pixel in canvas coordinates ``(x, y)``.

        Raises:
            ImageError: the point lies outside the picture.
        """
        height, width = item.frame.original
        if self.x >= width or self.y >= height:
            raise ImageError(
                f"{item.source}: point {self} lies outside the picture, which is {width} pixels "
                f"wide and {height} high"
            )
        return item.frame.to_canvas((int(self.x) + 0.5, int(self.y) + 0.5))


@dataclass(frozen=True)
class Renderer:
    """Draws the pictures of one run.

    Attributes:
        pipeline: with an upsampler.
        layout: ``"panel"`` (photograph, features, bilinear, upsampled, labelled), ``"single"``
            (the upsampled colours alone) or ``"overlay"`` (them over the grey photograph).
        output_size: size of single and overlay pictures, see
            :func:`fmupsample.images.parse_output_size`.
        foreground: find the foreground and darken the rest.
        note: pale words at the bottom right of every panel.
    """

    pipeline: Pipeline
    layout: Layout = "panel"
    output_size: str = "image"
    foreground: bool = False
    note: str = ""
    title: str = field(init=False, default="")

    def __post_init__(self) -> None:
        name = self.pipeline.upsampler.name
        title = METHODS[name].title if name in METHODS else name
        object.__setattr__(self, "title", title)

    # -- what is computed ---------------------------------------------------------------------

    def basis_tokens(self, item: Item) -> Tensor:
        """The tokens ``[N, C]`` of one picture that a basis is fitted on (foreground, if asked)."""
        features = self.pipeline.tokens(item)
        tokens = features.flatten(1).T
        if self.foreground:
            inside = Split.fit(features).apply(features).flatten() > 0
            if inside.any():
                tokens = tokens[inside]
        return tokens

    def scores(
        self, item: Item, basis: PCABasis, size: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Project, then upsample (or the other way round, where the upsampler is not linear).

        Returns:
            ``[V, h, w]`` of the whole canvas and ``[V, H, W]`` of the picture: the three PCA
            scores, and with :attr:`foreground` a fourth that is positive on the foreground.
        """
        pipeline = self.pipeline
        split = Split.fit(pipeline.tokens(item)) if self.foreground else None

        def project(features: Tensor) -> Tensor:
            scores = basis.apply(features)
            return scores if split is None else torch.cat([scores, split.apply(features)])

        low = project(item.features)
        if pipeline.upsampler.linear_in_value:
            high = pipeline.upsample(item, size, low)
        else:
            high = project(pipeline.upsample(item, size))
        return low, check_finite(high, item.source, "the upsampled map")

    # -- what is drawn ------------------------------------------------------------------------

    def draw_pca(self, item: Item, basis: PCABasis) -> Drawing:
        """The picture's features as colours, in the layout of this run."""
        return self.prepare_pca(item, basis)()

    def prepare_pca(self, item: Item, basis: PCABasis) -> Callable[[], Drawing]:
        """What :meth:`draw_pca` must compute; what this returns draws it, in any thread."""
        if self.layout == "panel":
            return partial(self._panel, item, basis, *self.scores(item, basis))
        size = parse_output_size(self.output_size, item.frame, item.grid)
        _, high = self.scores(item, basis, size)
        return partial(self._whole, item, basis, high, size)

    def _whole(self, item: Item, basis: PCABasis, high: Tensor, size: tuple[int, int]) -> Drawing:
        whole = (0, 0, size[1], size[0])
        if self.layout == "single":
            return Drawing(colours(basis, high), colours=whole)
        photo = self._photo(item, size)
        mixed = pca_overlay(photo, basis.to_rgb(high[:3]))
        if self.foreground:
            mixed = overlay(grey(photo) // 2, mixed, _inside(high))
        return Drawing(mixed, colours=whole)

    def _panel(self, item: Item, basis: PCABasis, low: Tensor, high: Tensor) -> Drawing:
        size = self._tile_size(item)
        (h, w), (height, width) = item.grid, high.shape[-2:]
        cells = self._blocks(item, colours(basis, low), size)
        tiles = [Tile("Photograph", self._photo(item, size)), Tile("Features", cells, f"{h} x {w}")]
        if self.pipeline.upsampler.name != "bilinear":
            smooth = colours(basis, _bilinear(low, item))
            tiles.append(Tile("Bilinear", resize(smooth, size)))
        sharp = resize(colours(basis, high), size)
        tiles.append(Tile(self.title, sharp, f"{height} x {width}"))
        panel = draw_panel(tiles, caption=str(item.source.relative), note=self.note)
        return Drawing(panel.pixels, photo=panel.boxes[0], colours=panel.boxes[-1])

    def draw_similarity(
        self, item: Item, points: Sequence[Point]
    ) -> list[Drawing | FmupsampleError]:
        """A panel for each point: the photograph, and how alike the rest of the picture is to it.

        A point outside the picture gives its error in place of the drawing.
        """
        results: list[Drawing | FmupsampleError] = []
        inside: list[tuple[int, tuple[float, float]]] = []
        for n, point in enumerate(points):
            try:
                inside.append((n, point.centre(item)))
                results.append(Drawing(np.empty(0)))
            except ImageError as error:
                results.append(error)
        if inside:
            maps = self.similarities(item, [centre for _, centre in inside])
            for (n, centre), low, high in zip(inside, *maps, strict=True):
                try:
                    check_finite(high, item.source, "the similarity map")
                    results[n] = self._similarity_panel(item, points[n], centre, low, high)
                except FmupsampleError as error:
                    results[n] = error
        return results

    def similarities(
        self,
        item: Item,
        centres: Sequence[tuple[float, float]],
        queries: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """To the features at ``centres``, or to those of ``queries`` ``[P, C]``."""
        if self.pipeline.upsampler.linear_in_value:
            kernels = self.pipeline.kernels(item)
            pixels = _pixels(item, centres)
            return similarity_maps(item.features, kernels.apply, pixels, queries=queries)
        dense = self.pipeline.upsample(item)
        if queries is None:
            queries = _at(dense, item, centres)
        queries = F.normalize(queries.T, dim=0)  # [C, P]
        low, high = (
            torch.einsum("cp,chw->phw", queries, F.normalize(values, dim=0))
            for values in (item.features, dense)
        )
        return low, high

    def _features_at(self, item: Item, centres: Sequence[tuple[float, float]]) -> Tensor:
        """The upsampled features at ``centres``, ``[P, C]``."""
        if self.pipeline.upsampler.linear_in_value:
            kernels = self.pipeline.kernels(item)
            return features_at(item.features, kernels.apply, _pixels(item, centres))
        return _at(self.pipeline.upsample(item), item, centres)

    def _similarity_panel(
        self, item: Item, point: Point, centre: tuple[float, float], low: Tensor, high: Tensor
    ) -> Drawing:
        size = self._tile_size(item)
        low_values, high_values = low.cpu().numpy(), high.cpu().numpy()
        bottom, top = heat_range(high_values)  # in both tiles
        photo = self._photo(item, size)
        dim = grey(photo)
        x = centre[0] * size[1] / item.frame.placed[1]
        y = centre[1] * size[0] / item.frame.placed[0]

        def tile(colours: np.ndarray) -> np.ndarray:
            return mark_point(overlay(dim, colours, HEAT_OPACITY), x, y)

        cells = self._blocks(item, heat_colours(low_values, bottom, top), size)
        sharp = resize(heat_colours(high_values, bottom, top), size)
        h, w = item.grid
        tiles = [
            Tile("Photograph", mark_point(photo, x, y), f"at {point}"),
            Tile("Similarity of the features", tile(cells), f"{h} x {w}"),
            Tile(f"Upsampled: {self.title}", tile(sharp)),
        ]
        bar = colour_bar(bottom, top, width=min(220, size[1] // 2), size=letter_size(size))
        panel = draw_panel(tiles, caption=str(item.source.relative), footer=bar)
        return Drawing(panel.pixels, photo=panel.boxes[0], colours=panel.boxes[-1])

    # -- tiles --------------------------------------------------------------------------------

    def _tile_size(self, item: Item) -> tuple[int, int]:
        """Of the original picture's shape, at about the resolution that the backbone saw.

        Where whole cells changed the shape by next to nothing, the pixels are shown as they are.
        """
        height, width = item.frame.original
        placed = item.frame.placed
        if abs(height * placed[1] / (width * placed[0]) - 1) < _SAME_SHAPE:
            return tile_size(*placed)
        scale = min(placed) / min(height, width)
        return tile_size(max(1, round(height * scale)), max(1, round(width * scale)))

    def _photo(self, item: Item, size: tuple[int, int]) -> np.ndarray:
        """The photograph at ``size``: from the canvas, or decoded anew where that is smaller."""
        height, width = item.frame.placed
        photo = item.canvas[:height, :width]
        original = item.frame.original
        if size[0] > height * 1.05 and original[0] > height * 1.05:
            with contextlib.suppress(ImageError):  # gone since: the small one will do
                photo, _ = read_picture(item.source.path, lambda _: size)
        return resize(photo, size)

    @staticmethod
    def _blocks(item: Item, cells: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        return blocks(cells, size, placed=item.frame.placed, canvas=item.frame.canvas)


def heat_range(values: np.ndarray) -> tuple[float, float]:
    """The similarities drawn in the first and last colour: usual background, and most alike."""
    bottom = float(np.quantile(values, 0.05))
    return bottom, max(float(np.quantile(values, 0.999)), bottom + 1e-3)


def letter_size(tile: tuple[int, int]) -> int:
    """Of the numbers at a colour bar beside tiles of this size."""
    return max(11, min(round((tile[0] * tile[1]) ** 0.5 / 30), 22))


def _pixels(item: Item, centres: Sequence[tuple[float, float]]) -> list[tuple[int, int]]:
    """``(row, column)`` of each ``(x, y)``."""
    height, width = item.frame.placed
    return [(min(int(y), height - 1), min(int(x), width - 1)) for x, y in centres]


def _at(dense: Tensor, item: Item, centres: Sequence[tuple[float, float]]) -> Tensor:
    """Of a map ``[C, H, W]``, the features ``[P, C]`` at ``centres``."""
    rows, columns = zip(*_pixels(item, centres), strict=True)
    return dense[:, list(rows), list(columns)].T


def colours(basis: PCABasis, values: Tensor) -> np.ndarray:
    """RGB of scores ``[3, ...]``, or ``[4, ...]`` with the foreground's: then dark outside it."""
    colours = basis.to_rgb(values[:3])
    return colours if len(values) == 3 else darken(colours, _inside(values))


def _inside(values: Tensor) -> np.ndarray:
    return opacity(values[3]).cpu().numpy()


def _bilinear(low: Tensor, item: Item) -> Tensor:
    """Plain bilinear interpolation of ``[V, h, w]`` to the canvas, without the padding."""
    height, width = item.frame.canvas
    placed = item.frame.placed
    # What F.interpolate gives, in a tenth of the time.
    full = [cv2.resize(plane, (width, height)) for plane in low.cpu().numpy()]
    return torch.from_numpy(np.stack(full)[:, : placed[0], : placed[1]])
