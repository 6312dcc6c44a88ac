"""The frames of videos as pictures of a run: named, and decoded in the order they are asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from fmupsample.errors import ImageError
from fmupsample.images.find import Source, is_video, printable, storable
from fmupsample.images.names import output_names
from fmupsample.images.read import read_picture, read_size
from fmupsample.video.clips import Clip, open_capture
from fmupsample.video.span import show_time

if TYPE_CHECKING:
    import cv2


@dataclass(frozen=True)
class FrameSource(Source):
    """One frame of the video at :attr:`path`; it is named ``clip/frame_000123``.

    Attributes:
        index: of the frame, from 0.
        time: when it is shown, in seconds.
        size: ``(H, W)`` of the video's frames.
        error: why the video cannot be used at all; else empty.
    """

    index: int = 0
    time: float = 0.0
    size: tuple[int, int] = (0, 0)
    error: str = ""

    def __str__(self) -> str:
        return f"{printable(self.path)} at {show_time(self.time)}"

    @property
    def absolute(self) -> str:
        """That of the video, as if the frame lay in it: no file is called so."""
        return f"{super().absolute}/{frame_name(self.index)}"

    @property
    def facts(self) -> dict[str, Any]:
        """What a manifest says of it beside the facts of a picture."""
        video = storable(super().absolute)
        return {"video": video, "frame_index": self.index, "time": self.time}


def frame_name(index: int) -> str:
    return f"frame_{index:06}"


@dataclass(frozen=True)
class Film(Source):
    """A video as one source: its result is one, too.

    Attributes:
        frames: those that are wanted; of a video that cannot be used, one that says why.
        rate: frames a second at which they last as long as in the video.
    """

    frames: tuple[FrameSource, ...] = field(default=(), compare=False)
    rate: float = field(default=0.0, compare=False)


def images_of(source: Source) -> tuple[Source, ...]:
    """What is decoded of a source: an image itself, the frames of a :class:`Film`."""
    return source.frames if isinstance(source, Film) else (source,)


def films_of(clips: Sequence[Clip]) -> list[Film]:
    """Each clip as a source, its frames named below a folder that no two videos share."""
    folders = output_names([clip.source for clip in clips], "")
    films = []
    for clip, folder in zip(clips, folders, strict=True):
        path = clip.source.path
        frames = [
            FrameSource(path, folder / frame_name(index), index, time, clip.size)
            for index, time in zip(clip.frames, clip.times, strict=True)
        ]
        if clip.error:
            frames = [FrameSource(path, folder / frame_name(0), error=clip.error)]
        films.append(Film(path, clip.source.relative, tuple(frames), clip.rate))
    return films


def with_frames(sources: Sequence[Source], clips: Sequence[Clip]) -> list[Source]:
    """``sources`` with its videos replaced by their frames."""
    frames = {clip.source: film.frames for clip, film in zip(clips, films_of(clips), strict=True)}
    return [one for source in sources for one in (frames[source] if is_video(source) else [source])]


def to_plain(source: Source) -> list[Any]:
    """An image, frame or film as plain values, for another process."""
    plain: list[Any] = [str(source.path), str(source.relative)]
    if isinstance(source, FrameSource):
        plain += [source.index, source.time, list(source.size), source.error]
    elif isinstance(source, Film):
        plain += [source.rate, [to_plain(frame) for frame in source.frames]]
    return plain


def from_plain(folder: Path, plain: Sequence[Any]) -> Source:
    """What :func:`to_plain` made, in a process whose working folder is ``folder`` to the other."""
    path, relative, *more = folder / plain[0], PurePosixPath(plain[1]), *plain[2:]
    if not more:
        return Source(path, relative)
    if len(more) == 2:
        rate, frames = more
        return Film(path, relative, tuple(from_plain(folder, frame) for frame in frames), rate)
    index, time, size, error = more
    return FrameSource(path, relative, index, time, tuple(size), error)


def size_of(source: Source) -> tuple[int, int]:
    """``(H, W)`` of a picture, from its header, or of a frame.

    Raises:
        ImageError: as :func:`fmupsample.images.read_size`.
    """
    if not isinstance(source, FrameSource):
        return read_size(source.path)
    if source.error:
        raise ImageError(source.error)
    return source.size


class FrameReader:
    """Decodes the pictures and frames of a run, in threads, each video once from its start.

    Frames must be announced in the order in which they are wanted (:meth:`watch`), and are then
    read in about that order: frames that a thread passes over are kept for the thread that will
    ask for them. Others cost a new start from the beginning of the video. Seeking is not used: it
    lands beside the frame in too many files.
    """

    def __init__(self) -> None:
        self._decoders: dict[Path, _Decoder] = {}

    def watch(self, sources: Iterable[Source]) -> Iterator[Source]:
        """``sources``, each announced before it is handed on."""
        for source in sources:
            if isinstance(source, FrameSource) and not source.error:
                if source.path not in self._decoders:
                    for other in self._decoders.values():
                        other.finish()
                    self._decoders[source.path] = _Decoder(source.path)
                self._decoders[source.path].expect(source.index)
            yield source

    def read(
        self, source: Source, wanted: Callable[[tuple[int, int]], tuple[int, int]] | None = None
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """As :func:`fmupsample.images.read_picture`, of a picture or a frame.

        Raises:
            ImageError: it cannot be read.
        """
        if not isinstance(source, FrameSource):
            return read_picture(source.path, wanted)
        if source.error:
            raise ImageError(source.error)
        decoder = self._decoders.get(source.path) or _Decoder(source.path)
        pixels = decoder.take(source)
        return np.ascontiguousarray(pixels[:, :, ::-1]), pixels.shape[:2]

    def close(self) -> None:
        """Close all videos."""
        for decoder in self._decoders.values():
            decoder.close()


class _Decoder:
    """One video that is being read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._capture: cv2.VideoCapture | None = None
        self._next = 0  # the frame that the next grab gives
        self._end: int | None = None  # where reading failed
        self._wanted: set[int] = set()
        self._passed: dict[int, np.ndarray] = {}
        self._last = False  # nothing more will be announced

    def expect(self, index: int) -> None:
        """``take`` will be called for this frame."""
        with self._lock:
            self._last = False
            self._wanted.add(index)

    def finish(self) -> None:
        """Close when what was announced has been taken."""
        with self._lock:
            self._last = True
            if not self._wanted:
                self._release()

    def take(self, source: FrameSource) -> np.ndarray:
        """Its pixels, uint8 ``[H, W, 3]``, BGR."""
        index = source.index
        with self._lock:
            self._wanted.discard(index)
            try:
                if index in self._passed:
                    return self._passed.pop(index)
                return self._decode(source)
            finally:
                if self._last and not self._wanted:
                    self._release()

    def _decode(self, source: FrameSource) -> np.ndarray:
        if self._end is None or source.index < self._end:
            if self._capture is None or source.index < self._next:
                self._release()
                self._capture, self._next = open_capture(self.path), 0
            while self._capture.grab():
                self._next += 1
                index = self._next - 1
                if index == source.index or index in self._wanted:
                    found, pixels = self._capture.retrieve()
                    if index == source.index:
                        if not found:
                            raise ImageError(f"{source} is a damaged frame")
                        return pixels
                    if found:
                        self._passed[index] = pixels
            self._end = self._next
        raise ImageError(f"{source} cannot be read any more: has the video changed?")

    def close(self) -> None:
        with self._lock:
            self._release()

    def _release(self) -> None:
        if self._capture is not None:
            self._capture.release()
            self._capture = None
        self._passed.clear()
