"""Which frames of a video are used, in which order they are read, and how one is written."""

from __future__ import annotations

import errno
import json
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import pytest
from drawn import PatchMeans, cut, draw, film, number

from fmupsample.errors import FmupsampleError, ImageError, OutputError, UsageError
from fmupsample.images import Source, find_images
from fmupsample.images.size import ImageSize
from fmupsample.pipeline import Pipeline
from fmupsample.video import Clip, FrameReader, FrameSource, Span, parse_time, scan, show_time
from fmupsample.video.clips import scan_videos
from fmupsample.video.frames import films_of, from_plain, size_of, to_plain, with_frames
from fmupsample.video.write import VideoFile


def look(path: Path, **span: float) -> Clip:
    return scan(Source(path, PurePosixPath(path.name)), Span(**span))


def frames(path: Path, **span: float) -> list[FrameSource]:
    clip = look(path, **span)
    return list(films_of([clip])[0].frames)


# -- times ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("0.5", 0.5), (".5", 0.5), ("1:30", 90), ("0:01:30.5", 90.5), ("100:00:00", 36e4),
     (" 7 ", 7)],
)  # fmt: skip
def test_times(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds
    assert parse_time(show_time(seconds)) == seconds


@pytest.mark.parametrize("text", ["", "x", "-1", "1:60", "1:60:00", "1:2:3:4", "1e3", "nan", "1:"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(UsageError, match=r"--from .* is not understood: give seconds"):
        parse_time(text, "--from")


def test_times_as_shown() -> None:
    assert [show_time(s) for s in (0, 0.999, 59.999, 3725.25)] == [
        "0:00:00", "0:00:01", "0:01:00", "1:02:05.25"
    ]  # fmt: skip


def test_a_span_that_cannot_be() -> None:
    with pytest.raises(UsageError, match=r"--to 0:00:01 is not after --from 0:00:02"):
        Span.parse(None, "2", "1")
    with pytest.raises(UsageError, match="every 0th"):
        Span(every=0)


# -- the first look -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mkv", "a.mov", "a.m4v"])
def test_all_frames(tmp_path: Path, name: str) -> None:
    clip = look(film(tmp_path / name, 7))
    assert clip.frames == tuple(range(7))
    assert clip.times == pytest.approx([n / 10 for n in range(7)], abs=1e-3)
    assert (clip.size, clip.fps, clip.broken, clip.error) == ((48, 64), 10, "", "")
    assert clip.rate == pytest.approx(10, abs=0.01)


@pytest.mark.parametrize(
    ("span", "expected", "rate"),
    [
        ({"every": 3}, (0, 3, 6, 9), 10 / 3),
        ({"start": 0.3, "stop": 0.6}, (3, 4, 5), 10),
        ({"start": 0.25}, (3, 4, 5, 6, 7, 8, 9), 10),
        ({"start": 0.5, "every": 2}, (5, 7, 9), 5),
        ({"stop": 0.05}, (0,), 10),
        ({"every": 100}, (0,), 10),
    ],
)
def test_parts_of_a_video(tmp_path: Path, span: dict, expected: tuple, rate: float) -> None:
    clip = look(film(tmp_path / "a.mp4"), **span)
    assert clip.frames == expected
    assert clip.rate == pytest.approx(rate, abs=0.01)
    assert not clip.broken


def test_a_part_behind_the_end(tmp_path: Path) -> None:
    clip = look(film(tmp_path / "a.mp4"), start=5)
    assert not clip.frames
    assert clip.error == (
        f"{tmp_path / 'a.mp4'} lasts 0:00:01: there is no frame from 0:00:05 to its end"
    )


def test_a_tail_that_is_cut_off(tmp_path: Path) -> None:
    path = cut(film(tmp_path / "a.avi", 20), 0.6)
    kept = look(path)
    assert 0 < len(kept.frames) < 15
    end = show_time(len(kept.frames) / 10)
    assert kept.broken == (
        f"{path} breaks off after {end} of 0:00:02 (damaged or cut off); "
        f"the {len(kept.frames)} frames before can be used"
    )
    # What was asked for is there: nothing is amiss.
    assert look(path, stop=0.2).broken == ""
    # What was asked for lies behind: there is nothing to use.
    behind = look(path, start=1.9)
    assert behind.error == kept.broken and not behind.frames


def test_matroska_that_is_cut_off(tmp_path: Path) -> None:
    clip = look(cut(film(tmp_path / "a.mkv", 20), 0.5))
    assert clip.broken and len(clip.frames) < 16


def test_what_is_no_video(tmp_path: Path) -> None:
    def error(path: Path) -> str:
        clip = look(path)
        assert not clip.frames
        return clip.error.replace(str(path), "FILE")

    no_video = "FILE is not a video in a format that can be read (its content was looked at, not its extension)"  # noqa: E501
    (tmp_path / "text.mp4").write_text("no video at all")
    assert error(tmp_path / "text.mp4") == no_video
    # A playlist would make the decoder open what it names.
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n")
    assert error(tmp_path / "list.mp4") == no_video
    (tmp_path / "list.avi").write_text("ffconcat version 1.0\nfile a.mp4\n")
    assert error(tmp_path / "list.avi") == no_video
    assert error(draw(tmp_path / "picture.png").rename(tmp_path / "picture.mov")) == no_video
    (tmp_path / "empty.mkv").write_bytes(b"")
    assert error(tmp_path / "empty.mkv") == "FILE is empty (0 bytes)"
    assert error(tmp_path / "gone.avi") == "FILE does not exist"
    (tmp_path / "folder.avi").mkdir()
    assert error(tmp_path / "folder.avi") == "FILE is a folder, not a video"
    half = cut(film(tmp_path / "half.mp4"), 0.5)
    assert error(half) == "FILE is damaged or cut off: no video can be found in it"
    assert error(film(tmp_path / "none.avi", 0)) == "FILE is a video without frames"
    start = film(tmp_path / "start.avi", 20)
    start.write_bytes(start.read_bytes().partition(b"movi")[0] + b"movi00dc" + bytes(200))
    assert error(start) == "FILE is damaged or cut off: none of its frames can be read"


def test_frames_that_are_too_large(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("fmupsample.video.clips._MOST_PIXELS", 48 * 64 - 1)
    path = film(tmp_path / "a.mp4", 1)
    assert look(path).error == (
        f"{path} claims frames of 48x64 pixels, more than are decoded safely "
        "(a damaged or hostile file?)"
    )


def test_decoders_say_nothing(tmp_path: Path, capfd) -> None:
    look(cut(film(tmp_path / "a.avi", 20), 0.6))
    look(cut(film(tmp_path / "a.mp4", 20), 0.6))
    assert capfd.readouterr().err == ""


def test_the_list_of_videos_keeps_their_order_and_warns(tmp_path: Path) -> None:
    class Heard:
        warnings: list[str] = []  # noqa: RUF012

        def start(self, total: int, label: str) -> None:
            assert total == 3

        def advance(self, steps: int = 1) -> None:
            pass

        def warn(self, message: str) -> None:
            self.warnings.append(message)

    film(tmp_path / "in/b.mp4", 3)
    cut(film(tmp_path / "in/c.avi", 20), 0.6)
    (tmp_path / "in/d.mp4").write_text("no")
    draw(tmp_path / "in/a.png")
    sources = find_images([tmp_path / "in"], videos=True)
    assert [s.path.name for s in sources] == ["a.png", "b.mp4", "c.avi", "d.mp4"]
    heard = Heard()
    clips = scan_videos(sources, Span(), progress=heard)
    assert [c.source for c in clips] == sources[1:]
    assert len(heard.warnings) == 1 and "c.avi breaks off" in heard.warnings[0]
    assert json.loads(json.dumps(clips[0].to_json()))["frames"] == 3
    assert [str(s.relative) for s in with_frames(sources, clips)][:5] == [
        "a.png", "b/frame_000000", "b/frame_000001", "b/frame_000002", "c/frame_000000"
    ]  # fmt: skip
    assert find_images([tmp_path / "in"]) == sources[:1]


# -- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_each_frame_is_the_right_one(tmp_path: Path, workers: int) -> None:
    wanted = [
        *frames(film(tmp_path / "a.avi", 25), every=2),
        Source(draw(tmp_path / "b.png"), PurePosixPath("b.png")),
        *frames(film(tmp_path / "c.mp4", 20), start=0.5, every=3),
    ]
    pipeline = Pipeline(PatchMeans(), workers=workers, batch_size=3)
    items = list(pipeline.items(wanted, on_error=stop))
    assert [item.source for item in items] == wanted
    for item in items:
        if isinstance(item.source, FrameSource):
            assert number(item.canvas) == item.source.index
            assert item.frame.original == (48, 64)


def stop(source: Source, error: FmupsampleError) -> None:
    raise error


def test_a_video_is_opened_once(tmp_path: Path, monkeypatch) -> None:
    opened = []
    capture = cv2.VideoCapture
    wanted = frames(film(tmp_path / "a.avi", 25))

    def count(*arguments: object) -> cv2.VideoCapture:
        opened.append(arguments)
        return capture(*arguments)

    monkeypatch.setattr(cv2, "VideoCapture", count)
    for workers in (0, 4):
        opened.clear()
        assert len(list(Pipeline(PatchMeans(), workers=workers).items(wanted, on_error=stop))) == 25
        assert len(opened) == 1


def test_a_reader_of_several_calls(tmp_path: Path, monkeypatch) -> None:
    """The next call goes on in the video; one that goes back begins it anew."""
    opened = []
    capture = cv2.VideoCapture
    wanted = frames(film(tmp_path / "a.avi", 25))
    monkeypatch.setattr(cv2, "VideoCapture", lambda *a: opened.append(a) or capture(*a))
    pipeline = Pipeline(PatchMeans(), workers=2)
    pipeline.reader = FrameReader()
    for part, opens in ((slice(0, 7), 1), (slice(10, 20), 1), (slice(20, 25), 1), (slice(3, 5), 2)):
        items = list(pipeline.items(wanted[part], on_error=stop))
        assert [number(item.canvas) for item in items] == [s.index for s in wanted[part]]
        assert len(opened) == opens
    pipeline.reader.close()


def test_any_order(tmp_path: Path) -> None:
    wanted = frames(film(tmp_path / "a.mp4"))
    reader = FrameReader()
    for index in (7, 2, 2, 9, 0):
        [source] = reader.watch([wanted[index]])
        assert number(reader.read(source)[0]) == index
    reader.close()
    assert number(Pipeline(PatchMeans()).load(wanted[4])[1]) == 4


def test_frames_in_hand_are_few(tmp_path: Path, monkeypatch) -> None:
    wanted = frames(film(tmp_path / "a.avi", 30))
    decoded = []
    read = FrameReader.read
    monkeypatch.setattr(
        FrameReader, "read", lambda self, source, w: decoded.append(source) or read(self, source, w)
    )
    items = Pipeline(PatchMeans(), workers=2, batch_size=1).items(wanted, on_error=stop)
    for n, _ in zip(range(20), items, strict=False):
        assert len(decoded) <= n + 5
    items.close()


def test_a_video_that_shrinks_meanwhile(tmp_path: Path) -> None:
    path = film(tmp_path / "a.avi", 20)
    wanted = frames(path)
    cut(path, 0.6)
    errors: list[str] = []
    items = Pipeline(PatchMeans()).items(wanted, on_error=lambda _, e: errors.append(str(e)))
    done = len(list(items))
    assert 0 < done < 20 and len(errors) == 20 - done
    assert "cannot be read any more: has the video changed?" in errors[-1]


def test_names_of_videos_are_their_own(tmp_path: Path) -> None:
    paths = [film(tmp_path / name, 2) for name in ("in/a.mp4", "in/a.avi", "in/B.mp4", "in/b.mkv")]
    sources = find_images([tmp_path / "in"], videos=True)
    assert {s.path for s in sources} == set(paths)
    named = {str(f.frames[0].relative) for f in films_of(scan_videos(sources))}
    assert named == {
        f"{name}/frame_000000" for name in ("a.mp4", "a.avi", "B.mp4", "b.mkv")
    }  # fmt: skip


def test_frames_travel_as_plain_values(tmp_path: Path) -> None:
    for source in (
        *frames(film(tmp_path / "a.mp4", 2)),
        *frames(tmp_path / "gone.mp4"),
        Source(tmp_path / "a.png", PurePosixPath("a.png")),
    ):
        plain = json.loads(json.dumps(to_plain(source)))
        assert from_plain(Path(), plain) == source


def test_sizes(tmp_path: Path) -> None:
    assert size_of(frames(film(tmp_path / "a.mp4", 1))[0]) == (48, 64)
    assert size_of(Source(draw(tmp_path / "a.png"), PurePosixPath("a.png"))) == (40, 60)
    with pytest.raises(ImageError, match="does not exist"):
        size_of(frames(tmp_path / "gone.mp4")[0])


# -- writing --------------------------------------------------------------------------------------


def test_odd_sizes_become_even_and_odd_rates_stay(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    with VideoFile(path, 10 / 3) as video:
        for n in range(5):
            video.append(np.full((33, 47, 3), 10 * n, np.uint8))
        video.append(np.full((66, 94, 3), 50, np.uint8))  # a video may change its size
    clip = look(path)
    assert clip.size == (34, 48) and len(clip.frames) == 6
    assert clip.fps == pytest.approx(10 / 3, abs=0.01)


def test_colours_are_not_swapped(tmp_path: Path) -> None:
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 0] = 200
    with VideoFile(tmp_path / "out.mp4", 10) as video:
        video.append(red)
    pixels, _ = FrameReader().read(frames(tmp_path / "out.mp4")[0])
    assert np.abs(pixels.reshape(-1, 3).mean(0) - (200, 0, 0)).max() < 12


def test_an_encoder_that_is_missing(tmp_path: Path, monkeypatch) -> None:
    class Closed:
        def __init__(self, *_: object) -> None:
            pass

        def isOpened(self) -> bool:
            return False

    monkeypatch.setattr(cv2, "VideoWriter", Closed)
    with (
        pytest.raises(OutputError, match=r"cannot write videos \(mp4v, 8x8 pixels\): `pip"),
        VideoFile(tmp_path / "out.mp4", 10) as video,
    ):
        video.append(np.zeros((8, 8, 3), np.uint8))


def test_a_file_that_is_not_whole(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(VideoFile, "_written", lambda self: self.frames - 1)
    with pytest.raises(OSError, match="not written whole") as caught:  # noqa: SIM117
        with VideoFile(tmp_path / "out.mp4", 10) as video:
            video.append(np.zeros((8, 8, 3), np.uint8))
    assert caught.value.errno == errno.ENOSPC


def test_embedded_model_on_a_frame(tmp_path: Path) -> None:
    from fmupsample.backbones import load_backbone
    from fmupsample.upsamplers import load_upsampler

    backbone = load_backbone("embedded")
    pipeline = Pipeline(backbone, load_upsampler(backbone), image_size=ImageSize.parse("112"))
    [item] = pipeline.items(frames(film(tmp_path / "a.mp4", 1)), on_error=stop)
    assert item.canvas.shape[:2] == (112, 154)
    assert pipeline.upsample(item).shape == (backbone.channels, 112, 154)
