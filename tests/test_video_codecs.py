"""Videos in other codecs and containers than those of most tests, and with uneven frame rates."""

from __future__ import annotations

import struct
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import pytest
from drawn import Blocks, PatchMeans, cut, film, gradient, number
from packets import film_at

from fmupsample.images import Source
from fmupsample.jobs.visualize import VisualizeOptions, visualize
from fmupsample.pipeline import Pipeline
from fmupsample.video import Clip, FrameReader, Span, scan
from fmupsample.video.clips import quiet
from fmupsample.video.frames import films_of

CODECS = [
    ("a.mp4", "mp4v"), ("a.mov", "mp4v"), ("a.mp4", "avc1"), ("a.mov", "avc1"), ("a.mp4", "hvc1"),
    ("a.mp4", "av01"), ("a.mp4", "vp09"), ("a.avi", "MJPG"), ("a.avi", "XVID"), ("a.avi", "FFV1"),
    ("a.avi", "I420"), ("a.webm", "VP80"), ("a.webm", "VP90"), ("a.mkv", "VP90"), ("a.mkv", "FFV1"),
    ("a.mkv", "MJPG"), ("a.mpg", "MPG2"), ("a.mpeg", "MPG1"),
]  # fmt: skip
UNEVEN = (0, 40, 80, 1000, 1010, 1020, 1500, 2500)  # ms


def look(path: Path, **span: float) -> Clip:
    return scan(Source(path, PurePosixPath(path.name)), Span(**span))


def shown(clip: Clip) -> list[int]:
    """The numbers that the frames of a clip show, read as a run reads them."""
    frames = films_of([clip])[0].frames
    items = Pipeline(PatchMeans(), workers=2, batch_size=2).items(frames, on_error=_stop)
    return [number(item.canvas) for item in items]


def _stop(source: Source, error: Exception) -> None:
    raise error


def written(path: Path, codec: str, count: int) -> Path:
    """A video of ``count`` frames, ten a second; skips where this OpenCV has no encoder."""
    code = cv2.VideoWriter_fourcc(*codec)
    with quiet():
        writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, code, 10.0, (64, 48))
    opened = writer.isOpened()
    writer.release()
    path.unlink(missing_ok=True)
    if opened:
        return film(path, count, codec=codec)
    if codec == "avc1":
        return film_at(path, range(0, 100 * count, 100), codec=codec)
    pytest.skip(f"OpenCV {cv2.__version__} cannot encode {codec} into {path.suffix}")


@pytest.mark.parametrize(("name", "codec"), CODECS)
def test_codecs(tmp_path: Path, name: str, codec: str) -> None:
    clip = look(written(tmp_path / name, codec, 12))
    assert (clip.broken, clip.error) == ("", "")
    assert clip.times == pytest.approx([n / 10 for n in range(12)], abs=2e-3)
    assert shown(clip) == list(clip.frames) == list(range(12))
    part = look(tmp_path / name, start=0.3, stop=0.8, every=2)
    assert shown(part) == list(part.frames) == [3, 5, 7]


# -- uneven frame rates ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "avc1"), ("a.mov", "MJPG"), ("a.mkv", "MJPG")]
)
def test_frames_are_chosen_by_their_own_times(tmp_path: Path, name: str, codec: str) -> None:
    path = film_at(tmp_path / name, UNEVEN, codec=codec)
    whole = look(path)
    assert whole.times == pytest.approx([time / 1000 for time in UNEVEN], abs=1e-3)
    assert shown(whole) == list(range(8)) and not whole.broken
    # By when a frame appears, not by its number; the one that is on display at 0.5 s came before.
    assert look(path, start=0.5, stop=1.5).frames == (3, 4, 5)
    assert look(path, stop=1.0).frames == (0, 1, 2)
    assert look(path, every=3).frames == (0, 3, 6)
    assert look(path, start=0.08, every=2).frames == (2, 4, 6)
    between = look(path, start=0.5, stop=0.9)
    assert between.error.endswith(": there is no frame from 0:00:00.5 to 0:00:00.9")


def test_the_video_of_uneven_frames(tmp_path: Path) -> None:
    """It has every frame, for equally long, and lasts as long."""
    path = film_at(tmp_path / "a.mkv", UNEVEN)
    pipeline = Pipeline(PatchMeans(), Blocks())
    visualize(pipeline, [], tmp_path / "out", VisualizeOptions(), clips=[look(path)])
    made = look(tmp_path / "out/a.mp4")
    assert len(made.frames) == 8
    assert made.times[-1] == pytest.approx(2.5, abs=0.01)
    assert np.diff(made.times) == pytest.approx(2.5 / 7, abs=0.01)


def test_a_last_frame_that_is_shown_for_long(tmp_path: Path) -> None:
    """All frames of the index are there: the video does not break off."""
    path = film(tmp_path / "a.mp4", 5)
    content = bytearray(path.read_bytes())
    for box in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stts"):  # with one number pair more
        at = content.index(box) - 4
        struct.pack_into(">I", content, at, struct.unpack_from(">I", content, at)[0] + 8)
    runs = content.index(b"stts") + 8
    one, count, ticks = struct.unpack_from(">3I", content, runs)
    assert (one, count) == (1, 5)
    content[runs : runs + 12] = struct.pack(">5I", 2, 4, ticks, 1, 100 * ticks)
    struct.pack_into(">I", content, content.index(b"mdhd") + 20, 104 * ticks)
    path.write_bytes(content)
    clip = look(path)
    assert clip.fps < 1  # five frames in more than ten seconds
    assert len(clip.frames) == 5 and not clip.broken


# -- cut off --------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["VP80", "VP90"])
def test_webm_that_is_cut_off(tmp_path: Path, codec: str) -> None:
    path = cut(written(tmp_path / "a.webm", codec, 20), 0.5)
    clip = look(path)
    assert 0 < len(clip.frames) < 10 and clip.broken.startswith(f"{path} breaks off after 0:00:00")
    assert shown(clip) == list(range(len(clip.frames)))
    head = cut(written(tmp_path / "b.webm", codec, 20), 0.1)
    assert look(head).error == f"{head} is damaged or cut off: no video can be found in it"


@pytest.mark.parametrize("whole", [True, False])
def test_webm_without_a_duration(tmp_path: Path, whole: bool) -> None:
    """As browsers record it: nothing says how long it should be."""
    path = written(tmp_path / "a.webm", "VP80", 20)
    content = bytearray(path.read_bytes())
    at = content.index(b"\x44\x89\x88")
    content[at : at + 2] = b"\xec\x89"  # nothing, of the same length
    path.write_bytes(content)
    clip = look(path if whole else cut(path, 0.6))
    assert not clip.broken and not clip.error
    assert (len(clip.frames) == 20) == whole and len(clip.frames) > 4
    assert shown(clip) == list(clip.frames)


# -- turned ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_orientation(tmp_path: Path, quarters: int) -> None:
    """What the header says of turning holds for every frame, and for what is made of them."""
    path = film(tmp_path / "a.mp4", [gradient(48, 64)] * 3)
    turn(path, quarters)
    clip = look(path)
    upright = np.rot90(gradient(48, 64), -quarters)
    assert clip.size == upright.shape[:2]
    frames = films_of([clip])[0].frames
    pixels, size = FrameReader().read(frames[0])
    assert size == pixels.shape[:2] == upright.shape[:2]
    assert np.abs(pixels.astype(float) - upright).mean() < 12
    pipeline = Pipeline(PatchMeans(), Blocks())
    options = VisualizeOptions(layout="single", output_size="original")
    visualize(pipeline, [], tmp_path / "out", options, clips=[clip])
    assert look(tmp_path / "out/a.mp4").size == upright.shape[:2]


def turn(path: Path, quarters: int) -> None:
    """Say in the header of an mp4 file that it is to be turned clockwise so often."""
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    cos, sin = [(1, 0), (0, 1), (-1, 0), (0, -1)][quarters]
    one = 1 << 16
    struct.pack_into(
        ">9i", content, matrix, cos * one, sin * one, 0, -sin * one, cos * one, 0, 0, 0, 1 << 30
    )
    path.write_bytes(content)
