"""Videos of frames that were encoded elsewhere, shown at any times: H.264, uneven frame rates.

OpenCV's wheels decode H.264 but do not encode it; they do put packets into files. So the few bytes
of an H.264 stream are written here: frames of one grey, whose blocks are stored as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
from drawn import level

from fmupsample.video.clips import quiet

_SIZE = (96, 128)  # which the header says
_HEADER = bytes.fromhex("00000001 67 42000af841a2 00000001 68 ce3880 00000001 05 888421a0")
_NEXT_BLOCK, _END = bytes.fromhex("0d00"), b"\x80"
_TICKS = 100  # a second, of the clock of a file


def film_at(path: Path, times: Sequence[int], *, codec: str = "MJPG") -> Path:
    """Save a video whose frames, of the greys of :func:`drawn.film`, are shown at ``times`` (ms).

    Args:
        times: multiples of 10.
        codec: ``"MJPG"``, or ``"avc1"`` (H.264, as ``.mp4``).
    """
    raw = getattr(cv2, "VIDEOWRITER_PROP_RAW_VIDEO", None)
    clock = getattr(cv2, "VIDEOWRITER_PROP_PTS", None)
    if raw is None or clock is None:
        pytest.skip(f"OpenCV {cv2.__version__} cannot write frames that are encoded already")
    path.parent.mkdir(parents=True, exist_ok=True)
    encode = _h264 if codec == "avc1" else _jpeg
    code = cv2.VideoWriter_fourcc(*codec)
    parameters = [raw, 1, cv2.VIDEOWRITER_PROP_KEY_INTERVAL, 1]
    with quiet():
        writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, code, _TICKS, _SIZE[::-1], parameters)
    if not writer.isOpened():
        pytest.skip(f"OpenCV {cv2.__version__} cannot write {codec} into {path.suffix}")
    for number, time in enumerate(times):
        writer.set(clock, time * _TICKS // 1000)
        writer.write(np.frombuffer(encode(level(number)), np.uint8))
    writer.release()
    return path


def _jpeg(grey: int) -> bytes:
    return cv2.imencode(".jpg", np.full((*_SIZE, 3), grey, np.uint8))[1].tobytes()


def _h264(grey: int) -> bytes:
    """A frame that stands for itself: sizes, the first block's head, blocks of 16 x 16 pixels."""
    luma = round(16 + grey * 219 / 255)
    block = bytes([luma]) * 256 + bytes([128]) * 128
    count = _SIZE[0] * _SIZE[1] // 256
    return _HEADER + _NEXT_BLOCK.join([block] * count) + _END
