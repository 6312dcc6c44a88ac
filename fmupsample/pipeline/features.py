"""From picture files to features, with the slow parts overlapping."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmupsample.backbones import Backbone
from fmupsample.device import autocast, check_precision, is_out_of_memory, resolve_device
from fmupsample.distributed import processes_here
from fmupsample.errors import FmupsampleError, ImageError, UsageError
from fmupsample.heap import return_freed
from fmupsample.images.arrays import planes
from fmupsample.images.find import Source, as_sources, stamp
from fmupsample.images.inputs import read_input
from fmupsample.images.prepare import fit_to_frame, normalise, normalise_part
from fmupsample.images.size import Frame, ImageSize, check_image_size, plan_frame
from fmupsample.layers.parts import InParts
from fmupsample.number_formats import number_format
from fmupsample.prefetch import prefetch
from fmupsample.threads import compute_alone, cores
from fmupsample.video.frames import FrameReader
from fmupsample.windows import (
    features_in_windows,
    overview_of,
    overview_size,
    window_side,
    with_coarse_part,
)

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
        stamp: of the file, before it was read, see :func:`fmupsample.images.find.stamp`.
        global_vector: float32 ``[D]`` of the whole picture, where the pipeline was asked for it.
    """

    source: Source
    frame: Frame
    canvas: np.ndarray
    features: Tensor
    guidance: Tensor | InParts
    window: tuple[int, int] | None = None
    stamp: tuple[int, int] | None = None
    global_vector: Tensor | None = None

    @property
    def image(self) -> Tensor:
        """The normalised canvas as one tensor; where it is not kept, it is made at every look."""
        return self.guidance[...]

    @property
    def grid(self) -> tuple[int, int]:
        """``(h, w)`` of the features."""
        return self.features.shape[-2], self.features.shape[-1]


class FeaturePipeline:
    """Shows pictures to a frozen backbone.

    Args:
        backbone: moved to ``device``.
        image_size: what :meth:`.ImageSize.of` reads: the short side (448), ``(H, W)``, "448x672" or
            "native"; ``None``: the backbone's own size, as the short side.
        device: as ``--device``; "auto" is a GPU where there is one.
        fit: ``"resize"`` or ``"pad"``, see :func:`fmupsample.images.plan_frame`.
        precision: of the backbone's arithmetic. Features are float32 in any case, and so are kernel
            weights; values given in another dtype are reassembled in it.
        batch_size: pictures of equal canvas size computed together; ``None``: 1 on the CPU (where
            more costs memory and gains nothing), 8 elsewhere. Halved when memory runs out.
        workers: threads that decode while others compute; ``None``: up to 4; 0: decode in the
            caller's thread.
        window: side of the overlapping windows in which larger canvases are shown to the backbone.
            ``None``: 1024 for canvases of more than 2048 x 2048 pixels. Where memory runs out,
            windows are halved.

    Attributes:
        global_vectors: whether items have a vector of the whole picture, see
            :meth:`.Backbone.forward`; of one shown in windows, from its overview.
        reader: decodes for all calls of :meth:`items` where it is set, so that the next frames of a
            video may come in another call; it is closed by whoever sets it. ``None``: each call has
            its own.

    Raises:
        UsageError: an option this backbone, device or machine cannot honour.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        image_size: ImageSize | int | str | tuple[int, int] | None = None,
        fit: str = "resize",
        device: torch.device | str = "auto",
        precision: str = "fp32",
        batch_size: int | None = None,
        workers: int | None = None,
        window: int | None = None,
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
        image_size = ImageSize.of(image_size)
        check_image_size(image_size, backbone)
        self.backbone = backbone.to(self.device).eval()
        self.image_size = image_size
        self.fit = fit
        self.precision = number_format(precision)
        self.batch_size = batch_size or (1 if self.device.type == "cpu" else 8)
        self.workers = _default_workers() if workers is None else workers
        self.window = window
        self.global_vectors = False
        self.reader: FrameReader | None = None

    def describe(self) -> dict[str, Any]:
        """All that decides the features of a picture; equal mappings, equal features."""
        backbone = self.backbone
        size = str(self.image_size or backbone.default_image_size)
        if backbone.fixed_size is not None:
            size = f"{backbone.fixed_size[0]}x{backbone.fixed_size[1]}"
        described: dict[str, Any] = {
            "backbone": backbone.name,
            "backbone_fingerprint": backbone.fingerprint,
            "layer": str(backbone.layer),
            "precision": self.precision,
            "image_size": size,
            "fit": self.fit,
        }
        if getattr(backbone, "views", 1) != 1:
            described["views"] = backbone.views
        return described if self.window is None else {**described, "window": self.window}

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

    def _loaded(
        self, source: Source, reader: FrameReader
    ) -> tuple[tuple[int, int] | None, Frame, np.ndarray]:
        before = stamp(source)
        return (before, *self.load(source, reader))

    def _frame(self, source: Source, original: tuple[int, int]) -> Frame:
        try:
            return self.frame(original)
        except ImageError as error:
            raise ImageError(f"{source}: {error}") from None

    def item(self, image: Any) -> Item:
        """One image in hand, with its features: a path, Pillow image, uint8 array or tensor.

        Raises:
            ImageError, ShapeError, UsageError: as of :func:`fmupsample.images.inputs.read_input`;
                ImageError also where the backbone needs more memory than there is.
        """
        path = Path(image if isinstance(image, str | os.PathLike) else "image")
        source = Source(path, PurePosixPath(path.name))
        pixels, original = read_input(image, lambda size: self._frame(source, size).placed)
        frame = self._frame(source, original)
        loaded = _Loaded(0, source, None, frame, fit_to_frame(pixels, frame))
        [item] = self._batch([loaded], _raise)
        assert item is not None  # else it was raised
        return item

    def items(
        self,
        sources: Iterable[Source | str | Path] | str | Path,
        *,
        on_error: OnError | None = None,
    ) -> Iterator[Item]:
        """Each picture, or frame of a video, with its features, in the order of ``sources``.

        Pictures are decoded in threads ahead, and those of equal canvas size share a batch.

        Args:
            sources: what :func:`fmupsample.images.find_images` found, or paths, folders, patterns.
            on_error: told, in the caller's thread, about each picture that could not be used; every
                other error ends the loop. ``None``: they all do.
        """
        on_error = on_error or _raise
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
        loaded = prefetch(
            partial(self._loaded, reader=reader),
            reader.watch(as_sources(sources)),
            workers=self.workers,
            ahead=self.workers + self.batch_size,
            begin=compute_alone,
        )
        try:
            for number, (source, result, error) in enumerate(loaded):
                if error is not None:
                    if not isinstance(error, FmupsampleError):
                        raise error
                    on_error(source, error)
                    continue
                assert result is not None
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
                return [*self._features(batch, window)]
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
        features: Sequence[Tensor] | Tensor
        vectors: Sequence[Tensor | None]
        images: Sequence[Tensor | InParts]
        if window is None:
            images = whole = [self._whole(p.canvas) for p in batch]  # [3, H, W]
            features, vectors = self._seen(torch.stack(whole))  # [B, C, h, w]
        else:
            return_freed()  # what decoding took
            images = parts = [self._in_parts(p.canvas) for p in batch]
            features, vectors = zip(*(self._windowed(i, window) for i in parts), strict=True)
        return [
            Item(p.source, p.frame, p.canvas, features[i], images[i], window, p.stamp, vectors[i])
            for i, p in enumerate(batch)
        ]

    def _seen(self, images: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Features of whole images, float32, and their vectors where they are wanted."""
        if not self.global_vectors:
            return self._run_backbone(images).float(), [None] * len(images)
        features, vectors = self._run_backbone(images, return_global=True)
        return features.float(), vectors.float()

    def guidance(
        self, canvas: np.ndarray, window: tuple[int, int] | None = None
    ) -> Tensor | InParts:
        """A canvas as :attr:`Item.guidance` has it; of one in windows 3 bytes a pixel, not 15."""
        return self._whole(canvas) if window is None else self._in_parts(canvas)

    def _whole(self, canvas: np.ndarray) -> Tensor:
        return normalise(canvas, self.backbone.mean, self.backbone.std).to(self.device)

    def _in_parts(self, canvas: np.ndarray) -> InParts:
        mean, std = self.backbone.mean, self.backbone.std
        pixels = planes(canvas).to(self.device)
        return InParts(pixels, partial(normalise_part, mean=mean, std=std))

    def _windowed(self, image: InParts, window: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Features ``[C, h, w]``, and the vector, of a picture shown in windows and once whole."""
        multiple = self.backbone.size_multiple
        # Views are shifted: a window shows them what is around it.
        around = getattr(self.backbone, "reach", (0, 0))
        run = partial(self._run_backbone, surrounded=True) if any(around) else self._run_backbone
        found = features_in_windows(run, image, window, multiple, self.batch_size, around)
        size = (image.shape[1], image.shape[2])
        small = overview_of(image, overview_size(size, window, multiple))
        coarse, vectors = self._seen(small[None])
        return with_coarse_part(found, coarse[0], size, window), vectors[0]

    def _run_backbone(self, images: Tensor, **more: bool) -> Tensor:
        with autocast(self.device, self.dtype):
            return self.backbone(images, **more)

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


def _raise(_source: Source, error: FmupsampleError) -> None:
    raise error


def _default_workers() -> int:
    return max(1, min(4, cores() // processes_here()))


@dataclass
class _Loaded:
    number: int
    source: Source
    stamp: tuple[int, int] | None
    frame: Frame
    canvas: np.ndarray
