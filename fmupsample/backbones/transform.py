"""From one image of any kind to what a backbone takes: resized, scaled, normalised."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor

from fmupsample.images.inputs import read_input
from fmupsample.images.prepare import fit_to_frame, normalise
from fmupsample.images.size import Frame, ImageSize, check_image_size, plan_frame


@dataclass(frozen=True)
class Transform:
    """An image (path, Pillow image, array, tensor) -> float32 ``[3, H, W]`` on the CPU.

    The whole image is shown, its aspect ratio kept; only a backbone of fixed size has it fitted
    into that size and its border repeated. It pickles, so it goes to the workers of a DataLoader;
    where batches are stacked there, :meth:`to_size` gives all images one size.

    Attributes:
        image_size: the size in pixels; ``None``: the backbone's default, as the short side.
        The others are those of :class:`.Backbone`.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size_multiple: tuple[int, int]
    fixed_size: tuple[int, int] | None
    default_image_size: int
    image_size: ImageSize | None = None

    def to_size(self, image_size: ImageSize | int | str | tuple[int, int] | None) -> Self:
        """Return the transform to another size, as :meth:`.ImageSize.of` reads it.

        Raises:
            UsageError: not understood, or a size that the backbone does not take.
        """
        size = ImageSize.of(image_size)
        check_image_size(size, self)
        return replace(self, image_size=size)

    def frame(self, original: tuple[int, int]) -> Frame:
        """Say how an image of ``original`` pixels ``(H, W)`` is shown to the backbone."""
        return plan_frame(original, self.image_size, self)

    def __call__(self, image: Any) -> Tensor:
        """Prepare one image.

        Raises:
            ImageError, ShapeError, UsageError: as of :func:`.read_input`.
        """
        pixels, original = read_input(image, lambda size: self.frame(size).placed)
        return normalise(fit_to_frame(pixels, self.frame(original)), self.mean, self.std)
