"""From features to upsampled maps and kernel weights, in memory that stays bounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fmupsample.backbones import Backbone
from fmupsample.device import is_out_of_memory
from fmupsample.errors import UsageError
from fmupsample.images.size import ImageSize
from fmupsample.memory import available_memory
from fmupsample.ops import reassemble_window
from fmupsample.ops.memory import empty_map, on_huge_pages
from fmupsample.pipeline.features import FeaturePipeline, Item
from fmupsample.pipeline.sizes import finish, map_sizes
from fmupsample.upsamplers.base import Upsampler

# A float32 map larger than this is reassembled in slices of channels.
_CHUNK_BYTES = 384 * 2**20
# Kernel weights take a kilobyte a pixel on the way. On a CPU, maps of up to so many pixels are made
# at once; larger ones, which costs twice the time, in windows of so many.
_WHOLE_PIXELS, _WINDOW_PIXELS, _FEWEST_PIXELS = 2**21, 2**19, 2**16


@dataclass
class Kernels:
    """How each pixel of one picture's map mixes the low-resolution cells; see Pipeline.kernels."""

    weights: Tensor
    crop: tuple[int, int]  # of the reassembled map: the picture without its padding
    size: tuple[int, int]  # of the result: the crop, averaged or enlarged where they differ
    _pipeline: Pipeline = field(repr=False)

    def apply(self, value: Tensor) -> Tensor:
        """``value`` ``[V, h, w]`` -> ``[V, H, W]``."""
        upsampler = self._pipeline.upsampler
        assert upsampler is not None
        with torch.no_grad():
            return finish(upsampler.reassemble(self.weights, value[None])[0], self.crop, self.size)


class Pipeline(FeaturePipeline):
    """Runs pictures through a frozen backbone and an upsampler.

    Args:
        upsampler: moved to ``device``; ``None`` when only low-resolution features are wanted.
        max_memory: bytes that making one picture's map may take, beside models, picture and result;
            ``None``: half of what is free. Changes results by rounding only.

    The other arguments, attributes and errors are those of :class:`.FeaturePipeline`.
    """

    def __init__(
        self,
        backbone: Backbone,
        upsampler: Upsampler | None = None,
        *,
        image_size: ImageSize | int | str | tuple[int, int] | None = None,
        fit: str = "resize",
        device: torch.device | str = "auto",
        precision: str = "fp32",
        batch_size: int | None = None,
        workers: int | None = None,
        window: int | None = None,
        max_memory: int | None = None,
    ) -> None:
        super().__init__(
            backbone,
            image_size=image_size,
            fit=fit,
            device=device,
            precision=precision,
            batch_size=batch_size,
            workers=workers,
            window=window,
        )
        self.upsampler = None if upsampler is None else upsampler.to(self.device).eval()
        self.max_memory = max_memory
        self._most_pixels: int | None = None  # of kernels at once, after memory ran out

    def with_upsampler(self, upsampler: Upsampler) -> Pipeline:
        """The same backbone and options with another upsampler."""
        return self._like(upsampler=upsampler)

    def elsewhere(
        self, device: torch.device | str, *, batch_size: int | None, workers: int | None
    ) -> Pipeline:
        """The same models, moved to another device, with the options that depend on it."""
        return self._like(device=device, batch_size=batch_size, workers=workers)

    def _like(self, **changed: Any) -> Pipeline:
        same = {
            "upsampler": self.upsampler,
            "image_size": self.image_size,
            "fit": self.fit,
            "device": self.device,
            "precision": self.precision,
            "batch_size": self.batch_size,
            "workers": self.workers,
            "window": self.window,
            "max_memory": self.max_memory,
        }
        other = Pipeline(self.backbone, **{**same, **changed})
        other.global_vectors = self.global_vectors
        return other

    def to(self, device: torch.device) -> None:
        """Move the models, in place."""
        self.device = device
        self.backbone.to(device)
        if self.upsampler is not None:
            self.upsampler.to(device)

    def upsample(
        self, item: Item, size: tuple[int, int] | None = None, value: Tensor | None = None
    ) -> Tensor:
        """Upsampled map of the picture without its padding, ``[V, H, W]``, on the device.

        In the dtype of ``value``; float32 without one.

        Args:
            size: ``(H, W)`` of the result; default: the picture's size on the canvas.
            value: any map ``[V, h, w]`` on the grid of the features (PCA scores, class logits,
                similarities); default: the features. The kernels come from the features always.

        Raises:
            UsageError: without an upsampler, or ``value`` with one that is not linear.
        """
        if self._upsampler.linear_in_value:
            value = item.features if value is None else value
            full, crop, final = self._sizes(item, size)
            if self._upsampler.neighbours is None or self._at_once(full):
                return self.kernels(item, size).apply(value)
            return finish(self._by_rows(item, size, value, full, crop), crop, final)
        if value is not None:
            raise UsageError(
                f"upsampler {self._upsampler.name} is not linear in its values: "
                "it upsamples features only"
            )
        full, crop, size = self._sizes(item, size)
        with torch.no_grad():
            out = self._upsampler(item.features[None], item.image[None], size=full)[0]
            return finish(out, crop, size)

    def kernels(self, item: Item, size: tuple[int, int] | None = None) -> Kernels:
        """The first half of :meth:`upsample`, for several values of one picture."""
        full, crop, size = self._sizes(item, size)
        bands = self._bands(item, full)
        weights, second = next(bands), next(bands, None)
        if second is not None:  # else it is all of them, in a form of the upsampler's own
            first, y = weights, 0
            weights = on_huge_pages(first.new_empty(*first.shape[:2], *full))
            for band in chain((first, second), bands):
                weights[:, :, y : y + band.shape[2]] = band
                y += band.shape[2]
        return Kernels(weights, crop, size, self)

    def kernel_rows(self, item: Item, size: tuple[int, int] | None = None) -> Iterator[Tensor]:
        """The kernel weights of the picture without its padding, ``[N, rows, W]`` from the top.

        In bounded memory. The rows together are the crop that :func:`map_sizes` names.
        """
        full, crop, _ = self._sizes(item, size)
        y = 0
        for band in self._bands(item, full):
            rows = band[0, :, : max(0, crop[0] - y), : crop[1]]
            y += band.shape[2]
            del band  # what is yielded is all that is kept of it
            if rows.shape[1] > 0:
                yield rows
            del rows

    def _by_rows(
        self,
        item: Item,
        size: tuple[int, int] | None,
        value: Tensor,
        full: tuple[int, int],
        crop: tuple[int, int],
    ) -> Tensor:
        """The map ``[V, H, W]`` at the size of the crop, without all kernel weights at once."""
        out = empty_map(value[None], *crop)[0]
        fractional = self._upsampler.neighbours == "fine"
        y = 0
        for rows in self.kernel_rows(item, size):
            part = reassemble_window(value[None], rows[None], full, (y, 0), fractional=fractional)
            out[:, y : y + rows.shape[1]] = part[0]
            y += rows.shape[1]
            del rows, part
        return out

    def _bands(self, item: Item, full: tuple[int, int]) -> Iterator[Tensor]:
        """Kernel weights ``[1, N, rows, W]`` of the whole canvas from the top.

        All at once where that fits. Where memory runs out, half as many pixels at a time go on from
        the row that was reached. A band is not kept here while the next one is made.
        """
        upsampler, x, guidance = self._upsampler, item.features[None], item.guidance
        done = 0
        while True:
            pixels = self._pixels_at_once()
            try:
                if self._at_once(full):
                    with torch.no_grad():
                        bands = iter([upsampler.kernels(x, guidance[None], full)])
                else:
                    bands = upsampler.kernels_in_rows(x, guidance.unsqueeze(0), full, pixels)
                y = 0
                # No decorator does this: that of a generator would keep what was yielded.
                while (band := _without_gradients(bands)) is not None:
                    y += band.shape[2]
                    if y > done:
                        new, done = y - done, y
                        yield band[:, :, band.shape[2] - new :]
                    del band
                return
            except Exception as error:
                most = min(pixels, full[0] * full[1])
                if not is_out_of_memory(error) or most <= _FEWEST_PIXELS:
                    raise
            self._most_pixels = most // 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _at_once(self, full: tuple[int, int]) -> bool:
        """Whether kernels for a map of this size are made in one piece."""
        most = self._most_pixels or self._allowed_pixels()
        if self.device.type == "cpu":
            most = min(most, _WHOLE_PIXELS)
        return full[0] * full[1] <= most

    def _pixels_at_once(self) -> int:
        return min(self._most_pixels or self._allowed_pixels(), _WINDOW_PIXELS)

    def _allowed_pixels(self) -> int:
        memory = self.max_memory
        if memory is None:
            memory = (available_memory(self.device) or 2**34) // 2
        return max(_FEWEST_PIXELS, memory // self._upsampler.bytes_per_pixel)

    def upsample_in_slices(
        self, item: Item, size: tuple[int, int] | None = None, value: Tensor | None = None
    ) -> Iterator[Tensor]:
        """:meth:`upsample` in slices of channels ``[v, H, W]``, so that memory stays bounded."""
        values = item.features if value is None else value
        full, _, final = self._sizes(item, size)
        chunk = min(_CHUNK_BYTES, (self.max_memory or 2**62) // 4)
        step = max(1, chunk // (4 * max(full[0] * full[1], final[0] * final[1])))
        if not self._upsampler.linear_in_value or step >= values.shape[0]:
            yield self.upsample(item, size, value)
            return
        kernels = self.kernels(item, size)
        start = 0
        while start < values.shape[0]:
            try:
                part = kernels.apply(values[start : start + step])
            except Exception as error:
                if not is_out_of_memory(error) or step == 1:
                    raise
                step = -(-step // 2)
                continue
            yield part
            start += len(part)

    @property
    def _upsampler(self) -> Upsampler:
        if self.upsampler is None:
            raise UsageError("this pipeline was made without an upsampler: it gives features only")
        return self.upsampler

    def _sizes(
        self, item: Item, size: tuple[int, int] | None
    ) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        return map_sizes(item.frame, item.grid, size)


@torch.no_grad()
def _without_gradients(bands: Iterator[Tensor]) -> Tensor | None:
    """The next one."""
    return next(bands, None)
