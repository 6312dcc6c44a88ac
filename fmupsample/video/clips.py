"""A first look at a video: how many frames it really has, when each is shown, where it breaks off.

What a file's header says of that is an estimate, or was true before the file was cut off; so the
frames are counted, which costs half of decoding them for use, and no further than the end of the
part that is wanted.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmupsample.errors import ImageError, UsageError
from fmupsample.images.find import Source, is_video, printable
from fmupsample.images.read import check_regular
from fmupsample.prefetch import prefetch
from fmupsample.progress import SILENT, Progress
from fmupsample.video.span import Span, show_time

if TYPE_CHECKING:
    import cv2

_MOST_PIXELS = 2**27  # a frame of more is a damaged or hostile file
_RATES = (0.1, 240.0)  # frames a second that a player can be asked for
# The clock of a file says it breaks off if frames are missing for longer than three of them, and
# than this, or this share of the video: sound may well go on after the last picture.
_SILENT_SECONDS, _SILENT_SHARE = 2.0, 0.1
# How files begin in which frames can be looked for. Others (playlists, above all) could make the
# decoder open further files.
_MP4_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot"})
_BEGINNINGS = (b"\x1aE\xdf\xa3", b"\0\0\1\xba", b"\0\0\1\xb3")
_PACKET = 188  # bytes, of a transport stream


@dataclass(frozen=True)
class Clip:
    """A video, and the frames of it that are wanted.

    Attributes:
        size: ``(H, W)`` of a frame, upright.
        fps: frames a second, as the file says.
        frames: indices of the frames that are wanted, from 0 at the beginning of the file.
        times: when each of them is shown, in seconds.
        broken: where the video breaks off before its end, as a sentence; else empty.
        error: why it cannot be used at all, as a sentence; then there are no frames.
    """

    source: Source
    size: tuple[int, int] = (0, 0)
    fps: float = 0.0
    frames: tuple[int, ...] = ()
    times: tuple[float, ...] = ()
    broken: str = ""
    error: str = ""

    @property
    def rate(self) -> float:
        """Frames a second at which the frames that are wanted last as long as in the video."""
        rate = self.fps
        if len(self.times) > 1:
            rate = (len(self.times) - 1) / max(self.times[-1] - self.times[0], 1e-6)
        return round(min(max(rate, _RATES[0]), _RATES[1]), 3)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a summary."""
        return {
            "source": str(self.source),
            "size": list(self.size),
            "fps": round(self.fps, 3),
            "frames": len(self.frames),
            "from": self.times[0] if self.times else None,
            "to": self.times[-1] if self.times else None,
            "breaks_off": self.broken or None,
            "error": self.error or None,
        }


def wanted_clips(
    sources: Sequence[Source],
    every: int | None,
    start: str | None,
    stop: str | None,
    *,
    progress: Progress = SILENT,
) -> list[Clip]:
    """The frames that ``--every``, ``--from`` and ``--to`` mean of each video in ``sources``.

    Raises:
        UsageError: options that cannot be honoured, or without a video.
    """
    given = {"--every": every, "--from": start, "--to": stop}
    named = [option for option, value in given.items() if value is not None]
    if any(is_video(source) for source in sources):
        return scan_videos(sources, Span.parse(every, start, stop), progress=progress)
    if named:
        verb = "is" if len(named) == 1 else "are"
        raise UsageError(f"{' and '.join(named)} {verb} for videos, and there is none here")
    return []


def scan_videos(
    sources: Sequence[Source], span: Span | None = None, *, progress: Progress = SILENT
) -> list[Clip]:
    """Look into each video of ``sources``, in their order; see :func:`scan`.

    ``progress.warn`` is told of those that break off.
    """
    videos = [source for source in sources if is_video(source)]
    clips = []
    progress.start(len(videos), "looking into videos")
    looked = prefetch(partial(scan, span=span or Span()), videos, workers=2, ahead=2)
    with contextlib.closing(looked):
        for _, clip, error in looked:
            if error is not None:
                raise error
            if clip.broken:
                progress.warn(clip.broken)
            clips.append(clip)
            progress.advance()
    return clips


def scan(source: Source, span: Span) -> Clip:
    """Find the frames of ``source`` that ``span`` asks for; never raises for what a file holds."""
    try:
        with opened(source.path) as capture:
            return _count(capture, source, span)
    except ImageError as error:
        return Clip(source, error=str(error))


def _count(capture: cv2.VideoCapture, source: Source, span: Span) -> Clip:
    import cv2

    fps = capture.get(cv2.CAP_PROP_FPS)
    fps = fps if 0 < fps < 1000 else 25.0
    named = max(0.0, capture.get(cv2.CAP_PROP_FRAME_COUNT))  # frames; by some files an estimate
    claimed = named / fps  # seconds
    frames: list[int] = []
    times: list[float] = []
    count, inside, time, size = 0, 0, 0.0, (0, 0)
    whole = False  # the end of what is wanted was seen
    while capture.grab():
        shown = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        if count > 0:  # files without a clock, and clocks that stand still, go by the rate
            time = shown if shown > time else time + 1 / fps
        else:
            time = shown if 0 < shown < 1e6 else 0.0
            _, pixels = capture.retrieve()
            if pixels is None:
                break
            size = pixels.shape[:2]
        if span.ends_by(time):
            whole = True
            break
        if span.begins_by(time):
            if inside % span.every == 0:
                frames.append(count)
                times.append(round(time, 6))
            inside += 1
        count += 1
    shown_path = printable(source.path)
    if size == (0, 0):
        if claimed > 0:
            return Clip(
                source, error=f"{shown_path} is damaged or cut off: none of its frames can be read"
            )
        return Clip(source, error=f"{shown_path} is a video without frames")
    broken = ""
    before = "the one frame" if count == 1 else f"the {count} frames"
    end = time + 1 / fps
    slack = 3 / fps + min(_SILENT_SECONDS, _SILENT_SHARE * claimed)
    # A last frame may be shown for long: where all frames are there, nothing breaks off.
    whole = whole or span.ends_by(end) or count >= named
    if not whole and claimed < 1e7 and claimed - end > slack:
        broken = (
            f"{shown_path} breaks off after {show_time(end)} of {show_time(claimed)} (damaged or "
            f"cut off); {before} before can be used"
        )
    if not frames:
        until = "its end" if span.stop is None else show_time(span.stop)
        error = (
            f"{shown_path} lasts {show_time(end)}: there is no frame from "
            f"{show_time(span.start)} to {until}"
        )
        return Clip(source, error=broken or error)
    return Clip(source, tuple(size), fps, tuple(frames), tuple(times), broken)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[cv2.VideoCapture]:
    """``with opened(path) as capture``.

    Raises:
        ImageError: it is missing, empty, or no video.
    """
    capture = open_capture(path)
    try:
        yield capture
    finally:
        capture.release()


def open_capture(path: Path) -> cv2.VideoCapture:
    """The same, for the caller to release."""
    shown = printable(path)
    try:
        check_regular(path, "video")
        with path.open("rb") as file:
            beginning = file.read(_PACKET + 1)
    except FileNotFoundError:
        raise ImageError(f"{shown} does not exist") from None
    except OSError as error:
        raise ImageError(f"{shown} cannot be read: {error.strerror}") from error
    if not beginning:
        raise ImageError(f"{shown} is empty (0 bytes)")
    if not _may_be_video(beginning):
        raise ImageError(
            f"{shown} is not a video in a format that can be read "
            "(its content was looked at, not its extension)"
        )
    with quiet():
        import cv2

        # Absolute: a relative name could be taken for a protocol.
        name = os.path.abspath(path)  # noqa: PTH100
        capture = cv2.VideoCapture(name, cv2.CAP_FFMPEG)
    if not capture.isOpened():
        capture.release()
        raise ImageError(f"{shown} is damaged or cut off: no video can be found in it")
    width, height = (capture.get(n) for n in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
    if width * height > _MOST_PIXELS:
        capture.release()
        raise ImageError(
            f"{shown} claims frames of {height:.0f}x{width:.0f} pixels, more than are decoded "
            "safely (a damaged or hostile file?)"
        )
    return capture


def _may_be_video(beginning: bytes) -> bool:
    riff = beginning[:4] == b"RIFF" and beginning[8:11] == b"AVI"
    packets = beginning[:1] == beginning[_PACKET:] == b"G"
    known = beginning[4:8] in _MP4_BOXES or beginning.startswith(_BEGINNINGS)
    return known or riff or packets


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The remarks of OpenCV and FFmpeg on odd files stay off the terminal; errors are ours."""
    # Read once in a process, when FFmpeg is first used.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    from cv2.utils import logging

    before = logging.getLogLevel()
    logging.setLogLevel(logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        logging.setLogLevel(before)
