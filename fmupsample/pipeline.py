"""From picture files to features and upsampled maps, with the slow parts overlapping.

pipeline = Pipeline(backbone, upsampler, image_size=ImageSize.parse("448"), device=device)
for item in pipeline.items(find_images(["photos"]), on_error=report):
    hr = pipeline.upsample(item)                    # [C, H, W]
    few = pipeline.upsample(item, value=scores)     # [V, H, W] of any map [V, h, w]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fmupsample.backbones import Backbone
from fmupsample.device import autocast, check_precision, is_out_of_memory, resolve_device
from fmupsample.distributed import processes_here
from fmupsample.errors import FmupsampleError, ImageError, UsageError
from fmupsample.heap import return_freed
from fmupsample.images.arrays import planes
from fmupsample.images.find import Source
from fmupsample.images.prepare import fit_to_frame, normalise, normalise_part
from fmupsample.images.size import Frame, ImageSize, check_image_size, parse_output_size, plan_frame
from fmupsample.layers.parts import InParts
from fmupsample.memory import available_memory
from fmupsample.ops import reassemble_window
from fmupsample.ops.memory import empty_map, on_huge_pages
from fmupsample.prefetch import prefetch
from fmupsample.threads import compute_alone, cores, models_take_all_cores
from fmupsample.upsamplers.base import Upsampler
from fmupsample.video.frames import FrameReader
from fmupsample.windows import (
    features_in_windows,
    overview_of,
    overview_size,
    window_side,
    with_coarse_part,
)

__all__ = ["Item", "Kernels", "Pipeline", "parse_output_size", "resolve_device"]

# A float32 map larger than this is reassembled in slices of channels.
_CHUNK_BYTES = 384 * 2**20
# The guidance shows no more detail than the canvas has, so maps of more pixels than that, and than
# these, are made at this size and enlarged bilinearly.
_DIRECT_PIXELS = 2**21
# Kernel weights take a kilobyte a pixel on the way. On a CPU, maps of up to so many pixels are made
# at once; larger ones, which costs twice the time, in windows of so many.
_WHOLE_PIXELS, _WINDOW_PIXELS, _FEWEST_PIXELS = 2**21, 2**19, 2**16
# Canvases of more pixels are shown to the backbone in windows of this side, unless told otherwise.
_BACKBONE_PIXELS, _BACKBONE_WINDOW, _LEAST_WINDOW = 2048**2, 1024, 224

OnError = Callable[[Source, FmupsampleError], None]


@dataclass
class Item:
    """One picture with its features.

    Attributes:
        canvas: what the backbone saw, uint8 ``[H, W, 3]``.
        features: float32 ``[C, h, w]`` of the whole canvas, on the pipeline's device.
        guidance: the canvas normalised for the backbone, float32 ``[3, H, W]``, on the device; of a
            canvas that was shown in windows, something that gives any part of it.
        window: ``(H, W)`` of the windows in which the backbone saw the canvas; ``None``: whole.
    """

    source: Source
    frame: Frame
    canvas: np.ndarray
    features: Tensor
    guidance: Tensor | InParts
    window: tuple[int, int] | None = None

    @property
    def image(self) -> Tensor:
        """The normalised canvas as one tensor; where it is not kept, it is made at every look."""
        return self.guidance[...]

    @property
    def grid(self) -> tuple[int, int]:
        """``(h, w)`` of the features."""
        return self.features.shape[-2], self.features.shape[-1]


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
            return _finish(upsampler.reassemble(self.weights, value[None])[0], self.crop, self.size)


class Pipeline:
    """Runs pictures through a frozen backbone and an upsampler.

    Args:
        backbone: moved to ``device``.
        upsampler: moved to ``device``; ``None`` when only low-resolution features are wanted.
        image_size: ``None``: the backbone's own size, as the short side.
        fit: ``"resize"`` or ``"pad"``, see :func:`fmupsample.images.plan_frame`.
        precision: of the backbone's arithmetic. Features are float32 in any case, and so are kernel
            weights; values given in another dtype are reassembled in it.
        batch_size: pictures of equal canvas size computed together; ``None``: 1 on the CPU (where
            more costs memory and gains nothing), 8 elsewhere. Halved when memory runs out.
        window: side of the overlapping windows in which larger canvases are shown to the backbone.
            ``None``: 1024 for canvases of more than 2048 x 2048 pixels. Where memory runs out,
            windows are halved.
        max_memory: bytes that making one picture's map may take, beside models, picture and result;
            ``None``: half of what is free. Changes results by rounding only.
        workers: threads that decode; ``None``: up to 4; 0: decode in the caller's thread. Threads
            decode while others compute, or, where the models take all cores of a CPU, in turns with
            them.

    Attributes:
        reader: decodes for all calls of :meth:`items` where it is set, so that the next frames of a
            video may come in another call; it is closed by whoever sets it. ``None``: each call has
            its own.

    Raises:
        UsageError: an option this backbone, device or machine cannot honour.
    """

    def __init__(
        self,
        backbone: Backbone,
        upsampler: Upsampler | None = None,
        *,
        image_size: ImageSize | None = None,
        fit: str = "resize",
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        batch_size: int | None = None,
        workers: int | None = None,
        window: int | None = None,
        max_memory: int | None = None,
    ) -> None:
        self.device = resolve_device(device)
        self.dtype = check_precision(precision, self.device)
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"batch size {batch_size} is not possible: it must be at least 1")
        if workers is not None and workers < 0:
            raise UsageError(f"{workers} workers are not possible: give 0 or more")
        if window is not None and window < 1:
            raise UsageError(f"a window of {window} pixels is not possible: give its side")
        if fit not in ("resize", "pad"):
            raise UsageError(f"--fit {fit} is unknown: use resize or pad")
        check_image_size(image_size, backbone)
        self.backbone = backbone.to(self.device).eval()
        self.upsampler = None if upsampler is None else upsampler.to(self.device).eval()
        self.image_size = image_size
        self.fit = fit
        self.precision = precision
        self.batch_size = batch_size or (1 if self.device.type == "cpu" else 8)
        self.workers = _default_workers() if workers is None else workers
        self.window = window
        self.max_memory = max_memory
        self.reader: FrameReader | None = None
        self._most_pixels: int | None = None  # of kernels at once, after memory ran out

    def with_upsampler(self, upsampler: Upsampler) -> Pipeline:
        """The same backbone and options with another upsampler."""
        return Pipeline(
            self.backbone,
            upsampler,
            image_size=self.image_size,
            fit=self.fit,
            device=self.device,
            precision=self.precision,
            batch_size=self.batch_size,
            workers=self.workers,
            window=self.window,
            max_memory=self.max_memory,
        )

    # -- pictures -> features -----------------------------------------------------------------

    def frame(self, original: tuple[int, int]) -> Frame:
        """How a picture of ``original`` pixels is shown to the backbone."""
        return plan_frame(original, self.image_size, self.backbone, self.fit)

    def load(self, source: Source, reader: FrameReader | None = None) -> tuple[Frame, np.ndarray]:
        """Decode one picture, or frame of a video -> its frame, canvas uint8 ``[H, W, 3]``.

        Args:
            reader: that has been told of the frames to come, if they are many.
        """
        pixels, original = (reader or FrameReader()).read(
            source, lambda size: self._frame(source, size).placed
        )
        frame = self._frame(source, original)
        return frame, fit_to_frame(pixels, frame)

    def _frame(self, source: Source, original: tuple[int, int]) -> Frame:
        try:
            return self.frame(original)
        except ImageError as error:
            raise ImageError(f"{source}: {error}") from None

    def items(self, sources: Iterable[Source], *, on_error: OnError) -> Iterator[Item]:
        """Each picture, or frame of a video, with its features, in the order of ``sources``.

        Pictures are decoded in threads ahead, and those of equal canvas size share a batch.
        ``on_error`` is told, in the caller's thread, about each picture that could not be used;
        every other error ends the loop.
        """
        # Enough pictures in hand to fill batches from neighbours of differing sizes.
        window = 1 if self.batch_size == 1 else 3 * self.batch_size
        buckets: dict[tuple[int, int], list[_Loaded]] = {}
        order: list[int] = []  # numbers of the pictures in hand, oldest first
        done: dict[int, Item | None] = {}  # None: failed

        def run(canvas: tuple[int, int]) -> None:
            batch = buckets.pop(canvas)
            done.update(zip((p.number for p in batch), self._batch(batch, on_error), strict=True))

        def ready() -> Iterator[Item]:
            while order and order[0] in done:
                item = done.pop(order.pop(0))
                if item is not None:
                    yield item

        reader = self.reader or FrameReader()
        in_turns = models_take_all_cores(self.device)
        loaded = prefetch(
            partial(self.load, reader=reader),
            reader.watch(sources),
            workers=self.workers,
            ahead=self.workers if in_turns else self.workers + self.batch_size,
            in_turns=in_turns,
            begin=compute_alone,
        )
        try:
            for number, (source, result, error) in enumerate(loaded):
                if error is not None:
                    if not isinstance(error, FmupsampleError):
                        raise error
                    on_error(source, error)
                    continue
                picture = _Loaded(number, source, *result)
                order.append(number)
                size = picture.frame.canvas
                buckets.setdefault(size, []).append(picture)
                if len(buckets[size]) >= self.batch_size:
                    run(size)
                yield from ready()
                if len(order) >= window:
                    run(next(s for s, b in buckets.items() if b[0].number == order[0]))
                    yield from ready()
            for size in list(buckets):
                run(size)
            yield from ready()
        finally:
            loaded.close()
            if reader is not self.reader:
                reader.close()

    def _batch(self, batch: list[_Loaded], on_error: OnError) -> list[Item | None]:
        """Features of pictures of equal canvas size.

        A batch too large for memory is halved; a single picture is shown in windows, and those are
        halved.
        """
        canvas = batch[0].frame.canvas
        window = self._backbone_window(canvas)
        while True:
            try:
                return self._features(batch, window)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if len(batch) > 1:
                half = len(batch) // 2
                return self._batch(batch[:half], on_error) + self._batch(batch[half:], on_error)
            window = self._smaller_window(canvas, window)
            if window is None:
                break
        height, width = canvas
        source = batch[0].source
        message = (
            f"{source}: at {height}x{width} the backbone needs more memory than "
            f"{self.device} has; use a smaller --image-size"
        )
        on_error(source, ImageError(message))
        return [None]

    def _backbone_window(self, canvas: tuple[int, int]) -> tuple[int, int] | None:
        """``(H, W)`` of the windows for a canvas; ``None``: it is shown whole."""
        if self.backbone.fixed_size is not None:
            return None
        side = self.window
        if side is None:
            side = _BACKBONE_WINDOW if canvas[0] * canvas[1] > _BACKBONE_PIXELS else max(canvas)
        window = window_side(canvas, side, self.backbone.size_multiple)
        return None if window == canvas else window

    def _smaller_window(
        self, canvas: tuple[int, int], window: tuple[int, int] | None
    ) -> tuple[int, int] | None:
        """The next one to try where memory ran out; ``None``: there is none."""
        side = max(window or canvas) // 2
        if self.backbone.fixed_size is not None or side < _LEAST_WINDOW:
            return None
        return window_side(canvas, side, self.backbone.size_multiple)

    @torch.no_grad()
    def _features(self, batch: list[_Loaded], window: tuple[int, int] | None) -> list[Item]:
        images = [self.guidance(p.canvas, window) for p in batch]  # [3, H, W]
        if window is None:
            features = self._run_backbone(torch.stack(images)).float()  # [B, C, h, w]
        else:
            return_freed()  # what decoding took
            features = [self._windowed(image, window) for image in images]
        return [
            Item(p.source, p.frame, p.canvas, features[i], images[i], window)
            for i, p in enumerate(batch)
        ]

    def guidance(
        self, canvas: np.ndarray, window: tuple[int, int] | None = None
    ) -> Tensor | InParts:
        """A canvas as :attr:`Item.guidance` has it; of one in windows 3 bytes a pixel, not 15."""
        mean, std = self.backbone.mean, self.backbone.std
        if window is None:
            return normalise(canvas, mean, std).to(self.device)
        pixels = planes(canvas).to(self.device)
        return InParts(pixels, partial(normalise_part, mean=mean, std=std))

    def _windowed(self, image: InParts, window: tuple[int, int]) -> Tensor:
        """Features ``[C, h, w]`` of a picture shown in windows, and once whole, made small."""
        multiple = self.backbone.size_multiple
        found = features_in_windows(self._run_backbone, image, window, multiple, self.batch_size)
        size = tuple(image.shape[1:])
        small = overview_of(image, overview_size(size, window, multiple))
        return with_coarse_part(found, self._run_backbone(small[None])[0], size, window)

    def _run_backbone(self, images: Tensor) -> Tensor:
        with autocast(self.device, self.dtype):
            return self.backbone(images)

    # -- features -> maps ---------------------------------------------------------------------

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
            return _finish(self._by_rows(item, size, value, full, crop), crop, final)
        if value is not None:
            raise UsageError(
                f"upsampler {self._upsampler.name} is not linear in its values: "
                "it upsamples features only"
            )
        full, crop, size = self._sizes(item, size)
        with torch.no_grad():
            out = self._upsampler(item.features[None], item.image[None], size=full)[0]
            return _finish(out, crop, size)

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

    def tokens(self, item: Item, value: Tensor | None = None) -> Tensor:
        """The low-resolution map ``[V, h, w]`` without the cells that lie in the padding only."""
        values = item.features if value is None else value
        height, width = (
            -(-placed * n // canvas)
            for placed, canvas, n in zip(
                item.frame.placed, item.frame.canvas, item.grid, strict=True
            )
        )
        return values[:, :height, :width]

    @property
    def _upsampler(self) -> Upsampler:
        if self.upsampler is None:
            raise UsageError("this pipeline was made without an upsampler: it gives features only")
        return self.upsampler

    def _sizes(
        self, item: Item, size: tuple[int, int] | None
    ) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        return map_sizes(item.frame, item.grid, size)


def map_sizes(
    frame: Frame, grid: tuple[int, int], size: tuple[int, int] | None
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """For a map of the picture: the size to upsample the whole canvas to, its crop, the result.

    With padding, the canvas's size is the one that gives the picture its size, to the nearest
    pixel. A map smaller than the grid (the original pixels of a thumbnail) is upsampled to the
    canvas and averaged down; a huge one is made smaller and enlarged.
    """
    crop = wanted = frame.placed if size is None else size
    limit = max(frame.canvas[0] * frame.canvas[1], _DIRECT_PIXELS)
    if wanted[0] * wanted[1] > limit:
        scale = (limit / (wanted[0] * wanted[1])) ** 0.5
        crop = tuple(max(1, int(n * scale)) for n in wanted)
    full = tuple(_whole(*axis) for axis in zip(crop, frame.placed, frame.canvas, grid, strict=True))
    if full[0] < grid[0] or full[1] < grid[1]:
        return frame.canvas, frame.placed, wanted
    return full, crop, wanted


@torch.no_grad()
def _without_gradients(bands: Iterator[Tensor]) -> Tensor | None:
    """The next one."""
    return next(bands, None)


def _finish(full: Tensor, crop: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """``[V, H, W]`` of the canvas -> the crop, brought to ``size``."""
    out = full[:, : crop[0], : crop[1]]
    if crop == size:
        return out
    if size[0] >= crop[0] and size[1] >= crop[1]:
        return F.interpolate(out[None], size=size, mode="bilinear", align_corners=False)[0]
    return F.adaptive_avg_pool2d(out, size)


def _default_workers() -> int:
    return max(1, min(4, cores() // processes_here()))


@dataclass
class _Loaded:
    number: int
    source: Source
    frame: Frame
    canvas: np.ndarray


def _whole(wanted: int, placed: int, canvas: int, cells: int) -> int:
    """Length of a map of the canvas in which the picture has length ``wanted``."""
    if placed == canvas:
        return wanted
    length = wanted * canvas / placed
    whole_ratio = max(1, round(length / cells)) * cells
    if round(whole_ratio * placed / canvas) == wanted:
        return whole_ratio  # an exact multiple of the grid, where rounding allows it
    return max(wanted, round(length))
