"""Writing a video frame by frame: MPEG-4 in an mp4 file, which every OpenCV wheel can encode."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fmupsample.errors import OutputError
from fmupsample.images.arrays import resize
from fmupsample.video.clips import quiet

if TYPE_CHECKING:
    import cv2

SUFFIX = ".mp4"
_CODEC = "mp4v"


class VideoFile:
    """``with VideoFile(path, fps) as video: video.append(pixels)``; or ``close``, or ``discard``.

    In place: the caller sees to a temporary name, which must end in ``.mp4``. The first frame
    decides the size. Sides are made even, as the encoder asks for, by repeating the last row or
    column.

    Raises:
        OSError: the file cannot be written, or was not written whole.
        OutputError: this OpenCV cannot encode.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self.fps = path, fps
        self.frames = 0
        self.size: tuple[int, int] | None = None  # (H, W), even
        self._writer: cv2.VideoWriter | None = None

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def append(self, pixels: np.ndarray) -> None:
        """The next frame, uint8 ``[H, W, 3]``, RGB; brought to the size of the first."""
        height, width = pixels.shape[:2]
        if height % 2 or width % 2:
            pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._writer is None:
            self.size = pixels.shape[:2]
            self._writer = self._open(self.size)
        assert self.size is not None
        if pixels.shape[:2] != self.size:  # some videos change theirs on the way
            pixels = resize(pixels, self.size)
        self._writer.write(np.ascontiguousarray(pixels[:, :, ::-1]))
        self.frames += 1

    def _open(self, size: tuple[int, int]) -> cv2.VideoWriter:
        self.path.write_bytes(b"")  # a folder that cannot be written says so
        with quiet():
            import cv2

            code = cv2.VideoWriter_fourcc(*_CODEC)
            name = str(self.path.absolute())
            writer = cv2.VideoWriter(name, cv2.CAP_FFMPEG, code, self.fps, size[::-1])
        if not writer.isOpened():
            raise OutputError(
                f"the installed OpenCV ({cv2.__version__}) cannot write videos ({_CODEC}, "
                f"{size[0]}x{size[1]} pixels): `pip install opencv-python-headless`, or --layout "
                "single for a smaller one"
            )
        return writer

    def close(self) -> None:
        """Finish the file."""
        if self._writer is None:
            return
        self._writer.release()
        if self._written() != self.frames:  # the encoder keeps errors to itself
            raise OSError(errno.ENOSPC, "it was not written whole; is the disk full?")

    def discard(self) -> None:
        """Close without finishing."""
        if self._writer is not None:
            self._writer.release()

    def _written(self) -> int:
        """Frames that are in the file by its own account."""
        with quiet():
            import cv2

            capture = cv2.VideoCapture(str(self.path.absolute()), cv2.CAP_FFMPEG)
        try:
            return int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
        finally:
            capture.release()
