"""One line from an image to the features of its pixels: :func:`features`."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fmupsample.backbones import Backbone
from fmupsample.draw.pca import PCABasis
from fmupsample.draw.renderer import Point, Renderer, colours
from fmupsample.errors import FmupsampleError, UsageError
from fmupsample.images.find import Source, is_several
from fmupsample.images.size import ImageSize
from fmupsample.pipeline import Item, Pipeline, open_pipeline
from fmupsample.upsamplers import Upsampler


class ImageFeatures:
    """The features of one image's pixels: nothing is upsampled before it is asked for.

    Colours and similarities are made from the low-resolution features and upsampled as such, which
    is exact; only :attr:`array` and :attr:`tensor` make the map of all channels, and keep it.

    Attributes:
        pipeline: the models, and how the image was shown to them.
        item: the image with its low-resolution features.
    """

    def __init__(self, pipeline: Pipeline, item: Item) -> None:
        self.pipeline, self.item = pipeline, item
        self._artist = Renderer(pipeline)

    @property
    def image(self) -> np.ndarray:
        """The pixels that the backbone saw, uint8 ``[H, W, 3]``."""
        height, width = self.item.frame.placed
        return self.item.canvas[:height, :width]

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of the map."""
        return (self.item.features.shape[0], *self.item.frame.placed)

    @property
    def lr(self) -> Tensor:
        """The backbone's own features, float32 ``[C, h, w]``, on the device."""
        return self.pipeline.tokens(self.item)

    @cached_property
    def tensor(self) -> Tensor:
        """The features of every pixel, float32 ``[C, H, W]``, on the device."""
        return self.pipeline.upsample(self.item)

    @property
    def array(self) -> np.ndarray:
        """The features of every pixel, float32 ``[C, H, W]``."""
        return self.tensor.cpu().numpy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.array, dtype=dtype, copy=copy)

    @cached_property
    def basis(self) -> PCABasis:
        """The principal components of this image: give them to :meth:`pca` of another one."""
        backbone = self.pipeline.backbone
        facts = {"backbone": backbone.name, "layer": str(backbone.layer)}
        return PCABasis.fit(self.lr.flatten(1).T, metadata=facts)

    def pca(self, basis: PCABasis | None = None) -> np.ndarray:
        """Draw the principal components as colours, uint8 ``[H, W, 3]``.

        Args:
            basis: of another image, for equal colours; default: :attr:`basis`.

        Raises:
            UsageError: a basis of another backbone or layer.
        """
        basis = self._checked(basis)
        _, high = self._artist.scores(self.item, basis)
        return colours(basis, high)

    def similarity(self, point: tuple[float, float], *, original: bool = False) -> np.ndarray:
        """Compute the cosine of every pixel's feature to that of one, float32 ``[H, W]``.

        Args:
            point: ``(x, y)``, x to the right, in pixels of :attr:`image`, the first is ``(0, 0)``.
            original: the point is in pixels of the image's own file.

        Raises:
            UsageError: no such pixel.
        """
        _, (high,) = self._artist.similarities(self.item, [self._centre(point, original)])
        return high.cpu().numpy()

    def panel(self, basis: PCABasis | None = None) -> Image.Image:
        """Draw the image, its features and the upsampled ones side by side."""
        drawn = self._artist.draw_pca(self.item, self._checked(basis))
        return Image.fromarray(drawn.pixels)

    def show(self) -> None:
        """Show :meth:`panel`: below the cell of a notebook, elsewhere in the system's viewer."""
        if "ipykernel" in sys.modules:
            from IPython.display import display

            display(self)
        else:
            self.panel().show()

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.panel().save(png, "png")
        return png.getvalue()

    def __repr__(self) -> str:
        backbone, (height, width) = self.pipeline.backbone, self.item.grid
        return (
            f"ImageFeatures({self.item.source}: {list(self.shape)} from {height} x {width} cells, "
            f"{backbone.name} layer {backbone.layer}, {self.pipeline.upsampler.name})"
        )

    def _checked(self, basis: PCABasis | None) -> PCABasis:
        if basis is None:
            return self.basis
        backbone = self.pipeline.backbone
        basis.check(backbone=backbone.name, layer=backbone.layer, channels=backbone.channels)
        return basis

    def _centre(self, point: tuple[float, float], original: bool) -> tuple[float, float]:
        frame = self.item.frame
        height, width = frame.original if original else frame.placed
        try:
            x, y = (float(n) for n in point)
        except (TypeError, ValueError):
            raise UsageError(f"a point is (x, y), not {point!r}") from None
        if not (0 <= x < width and 0 <= y < height):
            raise UsageError(
                f"point ({x:g}, {y:g}) lies outside the image, which is {width} pixels wide and "
                f"{height} high"
            )
        return Point(x, y).centre(self.item) if original else (int(x) + 0.5, int(y) + 0.5)


def features(
    images: Any,
    *,
    backbone: str | Backbone = "embedded",
    upsampler: str | Path | Upsampler | None = None,
    layer: int | str | None = None,
    image_size: ImageSize | int | str | tuple[int, int] | None = None,
    device: str | torch.device = "auto",
    on_error: Callable[[Any, FmupsampleError], None] | None = None,
) -> ImageFeatures | Iterator[ImageFeatures]:
    """Compute the features of every pixel of an image, or of many.

        f = fmupsample.features("cat.jpg")
        f.array                             # [C, H, W]
        f.similarity((120, 80))             # [H, W]
        for f in fmupsample.features("photos/", backbone="dinov2-s"):
            Image.fromarray(f.pca()).save(...)

    Args:
        images: a path, Pillow image, array ``[H, W, 3]`` or tensor ``[3, H, W]``, see
            :meth:`.Backbone.prepare`; or a list of them, a batch, a folder, a pattern.
        backbone: a name, as of :func:`fmupsample.load_backbone` (the last one used stays loaded),
            or a backbone.
        upsampler: as of :func:`fmupsample.load_upsampler`, or an upsampler.
        layer: of a backbone by name.
        image_size: the short side in pixels, ``(H, W)``, ``"448x672"`` or ``"native"``; default:
            what suits the backbone.
        device: "auto" is a GPU where there is one.
        on_error: is told of each of many images that cannot be used: what was given for it (a
            :class:`.Source` where it was a path), and the error. ``None``: the error ends the loop.

    Returns:
        :class:`ImageFeatures` of the one image, or an iterator of those of many.

    Raises:
        FmupsampleError: models that cannot be had; an image that cannot be used.
    """
    models = {"backbone": backbone, "upsampler": upsampler, "layer": layer}
    pipeline = open_pipeline(**models, image_size=image_size, device=device)
    if isinstance(images, str | os.PathLike):
        several = is_several(images)
    else:
        several = getattr(images, "ndim", 0) == 4 or (
            isinstance(images, Iterable) and not isinstance(images, np.ndarray | Tensor)
        )
    if not several:
        return ImageFeatures(pipeline, pipeline.item(images))
    return _each(pipeline, images, on_error)


def _each(
    pipeline: Pipeline, images: Any, on_error: Callable[[Any, FmupsampleError], None] | None
) -> Iterator[ImageFeatures]:
    paths = (str, os.PathLike, Source)
    if isinstance(images, paths) or (
        isinstance(images, list | tuple) and all(isinstance(image, paths) for image in images)
    ):
        for item in pipeline.items(images, on_error=on_error):  # decoded ahead, in batches
            yield ImageFeatures(pipeline, item)
        return
    for image in images:
        try:
            item = pipeline.item(image)
        except FmupsampleError as error:
            if on_error is None:
                raise
            on_error(image, error)
        else:
            yield ImageFeatures(pipeline, item)
