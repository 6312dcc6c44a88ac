"""``visualize`` of videos by several processes ends with the files of one."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from drawn import Blocks, PatchMeans, draw, film
from sharing import drawn, in_threads, logged, torchrun
from torch import distributed

from fmupsample.draw.renderer import Point
from fmupsample.errors import ImageError
from fmupsample.images import find_images
from fmupsample.jobs.visualize import Visualize, VisualizeOptions, visualize
from fmupsample.pipeline import Pipeline
from fmupsample.video import FrameReader, scan_videos

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="needs torch.distributed")

SMALL = ("--layout", "single", "--device", "cpu", "--image-size", "32x40")
FILMS = {"a.avi": 30, "b.mp4": 12, "deep/c.mkv": 40, "deep/d.mp4": 20, "e.avi": 9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five videos, three pictures, and a file that is no video."""
    folder = tmp_path_factory.mktemp("in")
    for name, frames in FILMS.items():
        film(folder / name, frames)
    for i in range(3):
        draw(folder / f"{i}.png", 16 + i, 40)
    (folder / "bad.mp4").write_text("no video")
    return folder


def work(folder: Path, out: Path, team=None, **options):
    """The pictures and videos of a folder, by one process or as one of a team."""
    first = team is None or team.leads
    sources = find_images([folder], videos=True) if first else []
    pictures = [source for source in sources if source.path.suffix == ".png"]
    progress = options.pop("progress", None)
    more = {"progress": progress} if progress and first else {}
    return visualize(
        Pipeline(PatchMeans(), Blocks()), pictures, out,
        VisualizeOptions(**{"layout": "single", **options}),
        clips=scan_videos(sources), workers=team, **more,
    )  # fmt: skip


def together(folder: Path, out: Path, size: int, **options) -> list:
    def one(team):
        try:
            return work(folder, out, team, **options)
        except KeyboardInterrupt:
            return "interrupted"

    return in_threads(size, one)


def summary_of(printed: str, out: Path) -> dict:
    """Without what differs from run to run."""
    summary = json.loads(printed.replace(str(out), "OUT"))
    return {key: value for key, value in summary.items() if key != "seconds"}


def test_two_processes_draw_the_videos_of_one(folder, tmp_path, monkeypatch, capsys) -> None:
    from fmupsample_cli import loading
    from fmupsample_cli.main import main

    monkeypatch.setattr(loading, "load_models", lambda *_, **__: (PatchMeans(), Blocks()))
    one, two = tmp_path / "one", tmp_path / "two"

    def commands(out: Path) -> list[list]:
        shared = ["visualize", folder, "-o", out / "shared", "--point", "3,3", "--json", *SMALL]
        image = ["visualize", folder, "-o", out / "image", "--basis", "image", "--json", *SMALL]
        return [shared, [*image, "--every", "2"], [*shared, "-q"]]

    alone = []
    for command in commands(one):
        assert main([str(word) for word in command]) == 3
        alone.append(capsys.readouterr().out)
    code, said, ends = torchrun(2, *commands(two))
    assert code == 0 and len(ends) == 3, said
    for name in ("shared", "image"):
        assert drawn(two / name) == drawn(one / name)
        assert logged(two / name) == logged(one / name)
    names = {"a.mp4", "b.mp4", "deep/c.mp4", "deep/d.mp4", "e.mp4"}
    assert names < set(drawn(two / "shared"))

    for (code, out, _), of_one in zip(ends, alone, strict=True):
        assert code == 3, out
        assert summary_of(out, two) == summary_of(of_one, one)
    summary = json.loads(ends[0][1])
    assert len(summary["drawn"]) == 2 * (3 + 5) and len(summary["videos"]) == 6
    assert [Path(failure["source"]).name for failure in summary["failed"]] == ["bad.mp4"]
    assert json.loads(ends[2][1])["skipped"] == 3 + 5
    frames = sum(FILMS.values())
    assert f"drawing, 2 processes: {4 + frames}/{4 + frames} pictures" in ends[0][2]


def test_four_processes_of_which_one_dies(folder, tmp_path) -> None:
    """It leaves a video half drawn, which the next run, of one process, draws."""
    out = tmp_path / "out"
    command = ["visualize", folder, "-q", "--layout", "single", "--device", "cpu", "-o", out]
    # The last process finishes its first video, and dies with the second.
    code, said, _ = torchrun(4, command, kill=(3, 1))
    assert code != 0 and "SIGKILL" in said
    before = {path: path.stat().st_mtime_ns for path in out.rglob("[a-e].mp4")}
    assert len(before) < 5 and not (out / "deep/d.mp4").exists()
    report = work(folder, out)
    assert out / "deep/d.mp4" in report.drawn
    assert sum(path.stat().st_mtime_ns == time for path, time in before.items()) >= len(before) - 3
    work(folder, tmp_path / "one")
    assert drawn(out) == drawn(tmp_path / "one") and logged(out) == logged(tmp_path / "one")


def test_a_video_is_for_one_process(folder, tmp_path, monkeypatch) -> None:
    """What fails in another process is heard by the first."""
    filmed: dict[str, list[int]] = {}
    film_of, read = Visualize._film, FrameReader.read

    def note(self, tasks, *rest):
        filmed.setdefault(tasks[0].source.path.name, []).append(threading.get_ident())
        return film_of(self, tasks, *rest)

    def fail(self, source, wanted=None):
        if source.path.name == "d.mp4" and source.index == 17:
            raise ImageError(f"{source} is a damaged frame")
        return read(self, source, wanted)

    monkeypatch.setattr(Visualize, "_film", note)
    monkeypatch.setattr(FrameReader, "read", fail)
    heard = Heard()
    first, *others = together(folder, tmp_path, 3, progress=heard)
    assert set(filmed) == {Path(name).name for name in FILMS} | {"bad.mp4"}
    assert all(len(who) == 1 for who in filmed.values())
    assert len({who for [who] in filmed.values()}) == 3
    assert [path.name for path in first.drawn if path.suffix == ".mp4"] == [
        "a.mp4", "b.mp4", "c.mp4", "e.mp4"
    ]  # fmt: skip
    assert sorted(Path(f["source"]).name for f in first.failed) == ["bad.mp4", "d.mp4"]
    assert any(said.endswith("d.mp4 at 0:00:01.7 is a damaged frame") for said in heard.warnings)
    assert sum(len(other.failed) for other in others) >= 1
    steps = sum(FILMS.values()) + 3 + 1  # of the file that is no video, one
    assert heard.total == steps and heard.done == steps


class Heard:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.total = self.done = 0

    def start(self, total: int, label: str) -> None:
        self.total, self.done = total, 0

    def advance(self, steps: int = 1) -> None:
        self.done += steps

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def test_ctrl_c(folder, tmp_path, monkeypatch) -> None:
    """The first waits for the others, and says which video is not finished."""

    class Interrupting(Heard):
        def advance(self, steps: int = 1) -> None:
            super().advance(steps)
            if self.total == 4 + sum(FILMS.values()) and self.done > 10:
                raise KeyboardInterrupt

    heard, out = Interrupting(), tmp_path / "out"
    first, second = together(folder, out, 2, progress=heard)
    assert first == "interrupted" and second.drawn
    assert any(warning.startswith("stopped: ") for warning in heard.warnings)
    there = {path.name for path in out.rglob("[a-e].mp4")}
    assert there == {path.name for path in second.drawn if path.suffix == ".mp4"} != set()
    report = work(folder, out)
    assert report.skipped >= len(there)
    work(folder, tmp_path / "one")
    assert drawn(out) == drawn(tmp_path / "one") and logged(out) == logged(tmp_path / "one")


def test_more_processes_than_videos(tmp_path) -> None:
    film(tmp_path / "in/a.mp4", 4)
    first, *others = together(tmp_path / "in", tmp_path / "out", 3, points=(Point(3, 3),))
    assert [path.name for path in first.drawn] == ["a.mp4", "a.point-3-3.mp4"]
    assert not any(other.drawn for other in others)
    assert set(drawn(tmp_path / "out")) == {"a.mp4", "a.point-3-3.mp4", "basis.safetensors"}
