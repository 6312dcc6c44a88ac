"""``visualize`` by several processes of ``torchrun`` ends with the files of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from drawn import Blocks, PatchMeans, draw
from sharing import drawn, in_threads, logged, torchrun
from torch import distributed

from fmupsample.draw.renderer import Point
from fmupsample.errors import OutputError, ProcessError
from fmupsample.images import find_images
from fmupsample.jobs.visualize import VisualizeOptions, visualize
from fmupsample.pipeline import Pipeline

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="needs torch.distributed")

PICTURES = 10
SMALL = ("--layout", "single", "--device", "cpu")


def alone(photos: Path, out: Path, **options):
    """The same in this process."""
    wanted = VisualizeOptions(**{"layout": "single", **options})
    return visualize(Pipeline(PatchMeans(), Blocks()), find_images([photos]), out, wanted)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(PICTURES):
        draw(folder / ("deep" if i % 3 == 0 else ".") / f"{i:02}.png", 16 + i, 40)
    (folder / "03.jpg").write_text("no picture")
    return folder


def test_two_processes_draw_the_pictures_of_one(photos, tmp_path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    alone(photos, one / "shared", points=(Point(3, 3),))
    alone(photos, one / "image", basis="image")
    shared = ["visualize", photos, "-o", two / "shared", "--point", "3,3", "--json", *SMALL]
    image = ["visualize", photos, "-o", two / "image", "--basis", "image", "-q", *SMALL]
    fit = ["visualize", photos, "-o", two / "fit", "--fit-head"]
    code, said, ends = torchrun(2, shared, [*shared, "-q"], image, fit)
    assert code == 0 and len(ends) == 4, said
    for name in ("shared", "image"):
        assert drawn(two / name) == drawn(one / name)
        assert logged(two / name) == logged(one / name)
    assert len(drawn(two / "shared")) == 2 * PICTURES + 2  # and the basis, and the sheet

    code, out, warned = ends[0]
    summary = json.loads(out)
    assert code == 3 and summary["pictures"] == PICTURES + 1
    expected = [f"{i:02}{end}" for i in range(PICTURES) for end in ("", ".point-3-3")]
    assert sorted(Path(path).stem for path in summary["drawn"]) == expected
    assert summary["drawn"] == [str(path) for path in _in_order(photos, two / "shared")]
    assert [Path(failure["source"]).name for failure in summary["failed"]] == ["03.jpg"]
    assert warned.count("03.jpg is not a picture") == 1
    assert f"features: {PICTURES + 1}/{PICTURES + 1} pictures" in warned
    assert f"drawing, 2 processes: {PICTURES + 1}/{PICTURES + 1} pictures" in warned
    code, out, _ = ends[1]  # all is there, but for the bad one
    assert code == 3 and json.loads(out)["skipped"] == PICTURES
    assert ends[3][0] == 2 and "--fit-head is for one process" in ends[3][2]


def _in_order(photos: Path, out: Path) -> list[Path]:
    again = alone(photos, out.with_name("again"), points=(Point(3, 3),))
    return [out / path.relative_to(out.with_name("again")) for path in again.drawn]


def test_four_processes_of_which_one_dies(photos, tmp_path) -> None:
    """Its share is drawn by the next run, of one process, and nothing is drawn twice."""
    one, out = tmp_path / "one", tmp_path / "out"
    alone(photos, one)
    command = ["visualize", photos, "-q", *SMALL, "-o", out]
    code, said, _ = torchrun(4, command, kill=(2, 1))
    assert code != 0 and "SIGKILL" in said
    before = {path: path.stat().st_mtime_ns for path in out.rglob("[0-9]*.png")}
    assert 1 <= len(before) < PICTURES
    report = alone(photos, out)
    assert len(report.drawn) >= PICTURES - len(before) and len(report.failed) == 1
    # Finished ones are left; one that was there, but not yet in the log, may be drawn again.
    assert sum(path.stat().st_mtime_ns == time for path, time in before.items()) >= report.skipped
    assert report.skipped >= len(before) - 4
    assert drawn(out) == drawn(one) and logged(out) == logged(one)


def share(photos: Path, out: Path, size: int, options=None, folders=None, progress=None) -> list:
    """Like ``torchrun``, in threads; ``options`` of the last process are others."""

    def work(team):
        last = team.rank == size - 1
        wanted = VisualizeOptions(**{"layout": "single", **((options or {}) if last else {})})
        sources = find_images([photos]) if team.leads else []
        here = (folders or {}).get(team.rank, out)
        more = {"progress": progress} if progress and team.leads else {}
        try:
            pipeline = Pipeline(PatchMeans(), Blocks())
            return visualize(pipeline, sources, here, wanted, workers=team, **more)
        except KeyboardInterrupt:
            return "interrupted"

    return in_threads(size, work)


def test_processes_that_do_not_fit_together(photos, tmp_path) -> None:
    first, second = share(photos, tmp_path / "out", 2, {"foreground": True})
    assert "process 2 of 2 has other models or options than the first" in str(second)
    assert isinstance(first, ProcessError)
    elsewhere = tmp_path / "elsewhere"
    first, second = share(photos, tmp_path / "out", 2, folders={1: elsewhere})
    assert isinstance(second, OutputError) and "into one and the same folder?" in str(second)
    assert isinstance(first, ProcessError)
    alone(photos, tmp_path / "out")  # goes on
    alone(photos, tmp_path / "one")
    assert drawn(tmp_path / "out") == drawn(tmp_path / "one")


class _Interrupting:
    """Ctrl-C when the first picture has been drawn."""

    label = ""

    def start(self, total: int, label: str) -> None:
        self.label = label

    def advance(self, steps: int = 1) -> None:
        if self.label.startswith("drawing"):
            raise KeyboardInterrupt

    def describe(self, label: str) -> None: ...

    def warn(self, message: str) -> None: ...


def test_ctrl_c(photos, tmp_path) -> None:
    """The first waits for the others, and the log is in order."""
    out = tmp_path / "out"
    first, second = share(photos, out, 2, progress=_Interrupting())
    assert first == "interrupted" and 4 <= len(second.drawn) <= 5
    assert len(logged(out)) >= len(second.drawn)
    report = alone(photos, out)
    assert report.skipped >= len(second.drawn) and report.drawn
    alone(photos, tmp_path / "one")
    assert drawn(out) == drawn(tmp_path / "one")


def test_more_processes_than_pictures(tmp_path) -> None:
    draw(tmp_path / "photos/a.png")
    first, *others = share(tmp_path / "photos", tmp_path / "out", 3)
    assert [path.name for path in first.drawn] == ["a.png"]
    assert not any(other.drawn for other in others)
    assert set(drawn(tmp_path / "out")) == {"a.png", "basis.safetensors"}
