"""``extract`` and ``visualize`` on videos: what they leave, and how a run is resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from drawn import Blocks, NotLinear, PatchMeans, cut, draw, film, number
from safetensors import safe_open
from safetensors.torch import load_file

import fmupsample
from fmupsample.draw.renderer import Point
from fmupsample.errors import OutputError, UsageError
from fmupsample.images import find_images
from fmupsample.jobs.extract import ExtractOptions, extract
from fmupsample.jobs.visualize import VisualizeOptions, visualize
from fmupsample.pipeline import Pipeline
from fmupsample.video import FrameReader, Span, scan_videos, with_frames
from fmupsample.video.write import VideoFile
from fmupsample_cli import loading
from fmupsample_cli.main import main


@pytest.fixture(autouse=True)
def small_models(monkeypatch) -> PatchMeans:
    """Every model of a command is PatchMeans and Blocks."""
    model = PatchMeans()
    monkeypatch.setattr(loading, "load_models", lambda *_, **__: (model, Blocks()))
    return model


class Heard:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.steps: list[tuple[str, int]] = []
        self.done = 0  # of the last stage

    def start(self, total: int, label: str) -> None:
        self.steps.append((label, total))
        self.done = 0

    def advance(self, steps: int = 1) -> None:
        self.done += steps

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def call(command: str, *arguments: object) -> int:
    return main([command, *map(str, arguments), "--device", "cpu", "-q"])


def files(folder: Path) -> list[str]:
    """All but the log of ``visualize``."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name != ".fmupsample"
    )


def frames_in(path: Path) -> list[np.ndarray]:
    """The frames of a result, RGB."""
    capture, found = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG), []
    while (read := capture.read())[0]:
        found.append(read[1][:, :, ::-1].astype(int))
    return found


# -- extract --------------------------------------------------------------------------------------


def test_frames_are_pictures(tmp_path: Path, capsys) -> None:
    film(tmp_path / "in/sub/clip.avi", 6)
    draw(tmp_path / "in/a.png")
    out = tmp_path / "out"
    assert call("extract", tmp_path / "in", "-o", out, "--json", "--every", 2, "--to", "0.5") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["done"], summary["skipped"], summary["failed"]) == (4, 0, 0)
    [video] = summary["videos"]
    assert (video["frames"], video["fps"], video["size"]) == (3, 10, [48, 64])
    assert (video["breaks_off"], video["error"]) == (None, None)
    assert files(out) == [
        "a.safetensors", "manifest.jsonl",
        *(f"sub/clip/frame_{n:06}.safetensors" for n in (0, 2, 4)),
    ]  # fmt: skip
    for n in (0, 2, 4):
        path = out / f"sub/clip/frame_{n:06}.safetensors"
        grey = load_file(path)["features"][:3] * 0.25 + 0.5  # as PatchMeans normalises
        assert number(grey.numpy() * 255) == n
        with safe_open(path, "pt") as file:
            meta = file.metadata()
        assert meta["video"] == str(tmp_path / "in/sub/clip.avi")
        assert json.loads(meta["frame_index"]) == n
        assert json.loads(meta["time"]) == pytest.approx(n / 10)
    records = map(json.loads, (out / "manifest.jsonl").read_text().splitlines())
    [record] = [r for r in records if r.get("frame_index") == 4]
    assert record["source"] == str(tmp_path / "in/sub/clip.avi/frame_000004")
    assert record["relative"] == "sub/clip/frame_000004"
    assert record["time"] == pytest.approx(0.4)
    assert record["frame"]["original"] == [48, 64]
    assert fmupsample.open(out / record["output"]).shape == (6, 32, 40)


def test_extract_goes_on_frame_by_frame(tmp_path: Path, small_models, monkeypatch, capsys) -> None:
    path, out = film(tmp_path / "clip.mp4", 8), tmp_path / "out"
    forward = PatchMeans.forward

    def stopped(self, images):
        if len(self.batches) == 3:
            raise KeyboardInterrupt
        return forward(self, images)

    monkeypatch.setattr(PatchMeans, "forward", stopped)
    assert call("extract", path, "-o", out) == 130
    assert "of 8 pictures are finished; the same command goes on from there" in (
        capsys.readouterr().err
    )
    there = [name for name in files(out) if name.startswith("clip")]
    assert 0 < len(there) <= 3 and all(name.endswith(".safetensors") for name in there)
    monkeypatch.setattr(PatchMeans, "forward", forward)
    assert call("extract", path, "-o", out, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["skipped"], summary["done"]) == (len(there), 8 - len(there))
    # Another stride finds its frames done.
    assert call("extract", path, "-o", out, "--json", "--every", 3) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["skipped"], summary["done"]) == (3, 0)
    # Another video of that name is another.
    film(path, 5)
    assert call("extract", path, "-o", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["done"] == 5


def test_extract_keeps_what_a_broken_video_has(tmp_path: Path, capsys) -> None:
    path = cut(film(tmp_path / "in/clip.avi", 20), 0.6)
    (tmp_path / "in/bad.mp4").write_text("no video")
    draw(tmp_path / "in/bad.png")
    out = tmp_path / "out"
    assert call("extract", tmp_path / "in", "-o", out) == 3
    streams = capsys.readouterr()
    first, second = streams.err.splitlines()
    assert first.startswith(f"warning: {path} breaks off after 0:00:00.")
    assert second.startswith(f"warning: {tmp_path / 'in/bad.mp4'} is not a video in a format")
    done = sum(name.startswith("clip/") for name in files(out))
    assert 0 < done < 15 and "bad.safetensors" in files(out)
    assert f"{done + 1} done, 1 failed" in streams.out
    assert f"2, {done} frames of them; 1 breaks off before the end; 1 cannot be used" in streams.out
    assert call("extract", tmp_path / "in", "-o", out, "--json") == 3  # and so again
    summary = json.loads(capsys.readouterr().out)
    assert (summary["done"], summary["skipped"]) == (0, done + 1)
    [failure] = summary["failures"]
    assert failure["source"] == str(tmp_path / "in/bad.mp4")
    # A video that was repaired leaves no failure behind.
    film(tmp_path / "in/bad.mp4", 2)
    assert call("extract", tmp_path / "in", "-o", out, "--every", 1) == 3
    records = map(json.loads, (out / "manifest.jsonl").read_text().splitlines())
    assert all(record["status"] == "ok" for record in records)


def test_one_projection_for_all_frames(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call("extract", film(tmp_path / "a.mp4", 9), "-o", out, "--pca", 1) == 0
    means = [
        float(load_file(out / f"a/frame_{n:06}.safetensors")["features"].float().mean())
        for n in range(9)
    ]
    steps = np.diff(means)
    assert (steps > 0).all() or (steps < 0).all()  # as the frames get brighter


def test_frames_in_shards(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call("extract", film(tmp_path / "a.mp4", 5), "-o", out, "--shard-size", 3) == 0
    samples = fmupsample.open_shards(out)
    assert sorted(samples.keys()) == [f"a/frame_{n:06}" for n in range(5)]


@pytest.mark.parametrize("command", ["extract", "visualize"])
def test_usage_errors_start_nothing(tmp_path: Path, capsys, command: str) -> None:
    picture, clip = draw(tmp_path / "a.png"), film(tmp_path / "a.mp4", 2)
    out = tmp_path / "out"

    def error(*arguments: object) -> str:
        assert call(command, *arguments, "-o", out) == 2
        assert not out.exists()
        return capsys.readouterr().err.strip()

    assert error(picture, "--every", 2) == "error: --every is for videos, and there is none here"
    assert error(picture, "--from", 2, "--to", 4) == (
        "error: --from and --to are for videos, and there is none here"
    )
    assert error(clip, "--from", 2, "--to", 1) == "error: --to 0:00:01 is not after --from 0:00:02"
    assert error(clip, "--fit-head").startswith(
        "error: --fit-head trains on pictures, and only videos are named"
    )
    assert error(clip, "--from", "soon") == (
        "error: --from 'soon' is not understood: give seconds (90.5) or h:mm:ss (0:01:30.5)"
    )


@pytest.mark.parametrize("command", ["extract", "visualize"])
def test_a_video_that_cannot_be_used_is_one_sentence(tmp_path: Path, capsys, command: str) -> None:
    path = tmp_path / "text.mp4"
    path.write_text("no video")
    assert call(command, path, "-o", tmp_path / "out") == 1
    assert capsys.readouterr().err == (
        f"warning: {path} is not a video in a format that can be read "
        "(its content was looked at, not its extension)\n"
    )


# -- visualize ------------------------------------------------------------------------------------


def scene(count: int) -> list[np.ndarray]:
    """Frames whose left half stays as it is, while the right half changes."""
    rng = np.random.default_rng(0)
    still = np.kron(rng.integers(0, 256, (6, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    moving = [
        np.kron(rng.integers(0, 40 + 20 * n, (6, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        for n in range(count)
    ]
    return [np.concatenate([still, right], axis=1) for right in moving]


@pytest.mark.parametrize("basis", ["shared", "image"])
def test_one_basis_for_a_video(tmp_path: Path, basis: str) -> None:
    path = film(tmp_path / "clip.avi", scene(10))
    out = tmp_path / "out"
    options = ("--layout", "single", "--basis", basis, "--image-size", 48)
    assert call("visualize", path, "-o", out, *options) == 0
    made = frames_in(out / "clip.mp4")
    assert len(made) == 10
    left = np.stack(made)[:, :, :28]
    assert left.std(axis=(1, 2)).min() > 20  # there is something to see
    assert np.abs(left - left[0]).mean(axis=(1, 2, 3)).max() < 5
    assert ("basis.safetensors" in files(out)) == (basis == "shared")


@pytest.mark.parametrize("layout", ["panel", "single", "overlay"])
def test_a_video_becomes_a_video(tmp_path: Path, capsys, layout: str) -> None:
    film(tmp_path / "in/sub/clip.avi", 9)
    draw(tmp_path / "in/a.png")
    draw(tmp_path / "in/b.png")
    out = tmp_path / "out"
    options = ("--layout", layout, "--every", 2, "--image-size", "40x56", "--json")
    assert call("visualize", tmp_path / "in", "-o", out, *options) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["pictures"], len(summary["drawn"]), summary["failed"]) == (2, 3, [])
    assert [video["frames"] for video in summary["videos"]] == [5]
    assert files(out) == [
        "a.png", "b.png", "basis.safetensors", "contact_sheet.png", "sub/clip.mp4"
    ]  # fmt: skip
    capture = cv2.VideoCapture(str(out / "sub/clip.mp4"), cv2.CAP_FFMPEG)
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(5)
    made = frames_in(out / "sub/clip.mp4")
    assert len(made) == 5 and not any(n % 2 for n in made[0].shape[:2])
    if layout == "panel":  # the picture on the left, as bright as it is
        height, width = made[0].shape[:2]
        middles = [number(m[height // 2, width // 4]) for m in made]
        assert middles == [0, 2, 4, 6, 8]
    else:
        assert made[0].shape[:2] == (40, 56)
    assert call("visualize", tmp_path / "in", "-o", out, *options) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["drawn"], summary["skipped"]) == ([], 3)


def test_another_part_is_drawn_again(tmp_path: Path, capsys) -> None:
    path, out = film(tmp_path / "clip.mp4", 9), tmp_path / "out"
    options = ("-o", out, "--layout", "single")
    assert call("visualize", path, *options) == 0
    assert call("visualize", path, *options, "--to", "0.4") == 0
    assert len(frames_in(out / "clip.mp4")) == 4
    assert "1 of 1 video complete" in capsys.readouterr().out


def test_similarity_to_a_point_of_the_first_frame(tmp_path: Path, capsys) -> None:
    """A bright square that moves: it is what the point was on, wherever it is."""
    frames = []
    for n in range(4):
        frame = np.full((48, 64, 3), (20, 20, 120), np.uint8)
        frame[16:32, 16 * n : 16 * n + 16] = (230, 120, 20)
        frames.append(frame)
    path, out = film(tmp_path / "clip.avi", frames), tmp_path / "out"
    options = ("--point", "8,24", "--point", "70,2", "--image-size", 48)
    assert call("visualize", path, "-o", out, *options) == 3
    said = capsys.readouterr().err
    assert said == (
        f"warning: {path}: point 70,2 lies outside the video, which is 64 pixels wide and 48 high\n"
    )
    assert files(out) == ["basis.safetensors", "clip.mp4", "clip.point-8-24.mp4"]
    made = frames_in(out / "clip.point-8-24.mp4")
    height, width = made[0].shape[:2]
    # The next run knows both.
    capsys.readouterr()
    assert call("visualize", path, "-o", out, *options[:2], *options[4:], "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["skipped"], summary["drawn"]) == (1, [])
    # Of the last frame, a row of the right tile.
    row = made[3][height // 2, int(0.53 * width) : int(0.97 * width)].sum(1)
    quarter = len(row) // 4
    assert row[-quarter:].mean() > 2 * row[: 3 * quarter - 8].mean()


def test_upsamplers_that_are_not_linear(tmp_path: Path) -> None:
    pipeline = Pipeline(PatchMeans(), NotLinear())
    sources = find_images([film(tmp_path / "a.mp4", 2)], videos=True)
    options = VisualizeOptions(points=(Point(3, 3),))
    report = visualize(pipeline, [], tmp_path / "out", options, clips=scan_videos(sources))
    assert [path.name for path in report.drawn] == ["a.mp4", "a.point-3-3.mp4"]


def test_foreground_is_for_pictures(tmp_path: Path, capsys) -> None:
    assert call("visualize", film(tmp_path / "a.mp4", 2), "-o", tmp_path, "--foreground") == 2
    assert capsys.readouterr().err.startswith(
        "error: --foreground divides each picture by itself, which would flicker in a video"
    )


def test_an_interrupted_video_is_drawn_from_its_start(
    tmp_path: Path, small_models, monkeypatch, capsys
) -> None:
    path, out = film(tmp_path / "clip.mp4", 8), tmp_path / "out"
    add, added = VideoFile.append, []

    def stopped(self, pixels):
        if len(added) == 3:
            raise KeyboardInterrupt
        added.append(add(self, pixels))

    monkeypatch.setattr(VideoFile, "append", stopped)
    assert call("visualize", path, "-o", out) == 130
    said = "warning: stopped: 0 of 1 pictures are finished; the same command goes on from there"
    assert said in capsys.readouterr().err
    assert files(out) == ["basis.safetensors"]
    monkeypatch.setattr(VideoFile, "append", add)
    assert call("visualize", path, "-o", out) == 0
    assert len(frames_in(out / "clip.mp4")) == 8


def test_what_a_killed_run_left_goes(tmp_path: Path) -> None:
    path, out = film(tmp_path / "clip.mp4", 2), tmp_path / "out"
    out.mkdir()
    (out / ".fmupsample-0-1-2.part.mp4").write_bytes(b"half")
    assert call("visualize", path, "-o", out) == 0
    assert files(out) == ["basis.safetensors", "clip.mp4"]


def test_files_of_others_stay(tmp_path: Path, capsys) -> None:
    path, out = film(tmp_path / "clip.mp4", 2), tmp_path / "out"
    film(out / "clip.mp4", 5)
    assert call("visualize", path, "-o", out) == 2
    assert "clip.mp4 exists and is not a result recorded" in capsys.readouterr().err
    assert len(frames_in(out / "clip.mp4")) == 5
    assert call("visualize", path, "-o", tmp_path) == 2
    assert "would replace an image or video of this run" in capsys.readouterr().err
    assert len(frames_in(path)) == 2


def test_a_disk_that_is_full_ends_the_run(tmp_path: Path, monkeypatch) -> None:
    sources = find_images([film(tmp_path / "a.mp4", 2)], videos=True)
    monkeypatch.setattr(VideoFile, "_written", lambda self: 0)
    pipeline, out = Pipeline(PatchMeans(), Blocks()), tmp_path / "out"
    with pytest.raises(OutputError, match=r"the disk is full .* what is finished is kept"):
        visualize(pipeline, [], out, clips=scan_videos(sources))
    assert files(out) == ["basis.safetensors"]


def test_progress_goes_by_frame(tmp_path: Path) -> None:
    sources = find_images([film(tmp_path / "a.mp4", 40)], videos=True)
    heard, clips = Heard(), scan_videos(sources)
    pipeline = Pipeline(PatchMeans(), Blocks())
    visualize(
        pipeline, [], tmp_path / "out", VisualizeOptions(layout="single"), clips=clips,
        progress=heard,
    )  # fmt: skip
    assert heard.steps == [("features", 20), ("drawing", 40)] and heard.done == 40
    heard = Heard()
    own = VisualizeOptions(layout="single", basis="image")
    visualize(pipeline, [], tmp_path / "own", own, clips=clips, progress=heard)
    assert heard.steps == [("drawing", 20 + 40)] and heard.done == 60
    heard = Heard()
    extract(pipeline, with_frames(sources, clips), tmp_path / "features", progress=heard)
    assert heard.steps == [("extracting", 40)]


def test_a_frame_that_fails_fails_the_video(tmp_path: Path, monkeypatch) -> None:
    sources = find_images([film(tmp_path / "a.mp4", 4), film(tmp_path / "b.mp4", 4)], videos=True)
    clips, heard = scan_videos(sources), Heard()
    read: Callable = FrameReader.read

    def fail(self, source, wanted=None):
        if source.path.name == "a.mp4" and source.index == 3:
            raise fmupsample.errors.ImageError(f"{source} is a damaged frame")
        return read(self, source, wanted)

    monkeypatch.setattr(FrameReader, "read", fail)
    report = visualize(
        Pipeline(PatchMeans(), Blocks()), [], tmp_path / "out",
        VisualizeOptions(basis="image"), clips=clips, progress=heard,
    )  # fmt: skip
    assert heard.steps == [("drawing", 16)] and heard.done == 16
    assert files(tmp_path / "out") == ["b.mp4"]
    assert heard.warnings == [f"{tmp_path / 'a.mp4'} at 0:00:00.3 is a damaged frame"]
    assert report.failed[0]["source"] == str(tmp_path / "a.mp4")


def test_options_of_the_library(tmp_path: Path) -> None:
    sources = find_images([film(tmp_path / "a.mp4", 4)], videos=True)
    clips = scan_videos(sources, Span(every=2))
    pipeline = Pipeline(PatchMeans(), Blocks())
    with pytest.raises(UsageError, match="--foreground"):
        visualize(pipeline, [], tmp_path / "o", VisualizeOptions(foreground=True), clips=clips)
    options = ExtractOptions(tokens_only=True)
    report = extract(pipeline, with_frames(sources, clips), tmp_path / "out", options)
    assert [record["frame_index"] for record in report.done] == [0, 2]
