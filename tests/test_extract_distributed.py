"""``extract`` by several processes of ``torchrun`` ends with the files of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from drawn import Blocks, PatchMeans, draw, film
from safetensors.torch import load_file
from sharing import in_threads, records, torchrun, visible
from torch import distributed

from fmupsample import open_shards
from fmupsample.errors import OutputError, ProcessError
from fmupsample.images import find_images
from fmupsample.jobs.extract import ExtractOptions, extract
from fmupsample.pipeline import Pipeline
from fmupsample.runs.manifest import Manifest
from fmupsample.runs.workers import Workers
from fmupsample.video import Span, scan_videos, with_frames

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="needs torch.distributed")

PICTURES = 18


def alone(photos: Path, out: Path, **options):
    """The same in this process."""
    pipeline = Pipeline(PatchMeans(), Blocks())
    return extract(pipeline, find_images([photos]), out, ExtractOptions(**options))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(PICTURES):
        draw(folder / ("deep" if i % 3 == 0 else ".") / f"{i:02}.png", 16 + i, 40)
    (folder / "bad.jpg").write_text("no picture")
    return folder


def samples(out: Path) -> dict[str, tuple]:
    shards = open_shards(out)
    return {key: (shards.info(key), shards[key].full().tolist()) for key in shards}


def test_two_processes_write_the_files_of_one(photos, tmp_path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    alone(photos, one / "pca", pca=2)
    alone(photos, one / "shards", shard_size=3)
    (tmp_path / "file").write_text("in the way")
    pca = ["extract", photos, "-o", two / "pca", "--pca", 2, "--json", "--device", "cpu"]
    shards = ["extract", photos, "-o", two / "shards", "--shard-size", 3, "-q"]
    wrong = ["extract", photos, "-o", tmp_path / "file", "-q"]
    code, said, ends = torchrun(2, pca, shards, [*pca, "-q"], wrong, ["bench", photos])
    assert code == 0 and len(ends) == 5, said
    assert visible(two / "pca") == visible(one / "pca")
    assert records(two / "pca") == records(one / "pca")
    names = sorted(path.name for path in (two / "shards").glob("*.tar"))
    assert names == [f"features-{i:06}.tar" for i in range(6)]
    assert samples(two / "shards") == samples(one / "shards")

    code, out, warned = ends[0]
    summary = json.loads(out)
    assert (code, summary["done"], summary["failed"]) == (3, PICTURES, 1)
    assert warned.count("bad.jpg is not a picture") == 1
    assert f"extracting, 2 processes: {PICTURES + 1}/{PICTURES + 1} pictures" in warned
    assert ends[1][0] == 3
    code, out, _ = ends[2]  # all is there, but for the bad one
    assert code == 3 and json.loads(out)["skipped"] == PICTURES
    assert ends[4][0] == 2
    assert ends[4][2].endswith("is for extract, visualize, probe predict and train\n")
    # An error is said by the first process, and the other ends with it.
    code, _, error = ends[3]
    assert code == 1 and error.endswith("is a file; the output must be a folder\n")
    assert said.strip().splitlines()[-2:] == ["process 1: code 1, said nothing"] * 2


def test_four_processes_of_which_one_dies(photos, tmp_path) -> None:
    """Its share is done by the next run, of one process, and nothing is done twice."""
    one, four, out = tmp_path / "one", tmp_path / "four", tmp_path / "out"
    alone(photos, one)
    command = ["extract", photos, "-q", "--device", "cpu", "-o"]
    code, said, ends = torchrun(4, [*command, four], [*command, out], kill=(2, 3))
    assert visible(four) == visible(one) and records(four) == records(one)
    assert code != 0 and len(ends) >= 1 and "SIGKILL" in said
    before = {
        source: (out / record["output"]).stat().st_mtime_ns
        for source, record in Manifest(out).records.items()
        if record["status"] == "ok"
    }
    assert 1 <= len(before) < PICTURES
    report = alone(photos, out)
    assert {record["source"] for record in report.skipped} == set(before)
    assert len(report.done) == PICTURES - len(before) and len(report.failed) == 1
    for record in report.skipped:
        assert (out / record["output"]).stat().st_mtime_ns == before[record["source"]]
    assert visible(out) == visible(one)
    assert records(out) == records(one)


def share(photos: Path, out: Path, size: int, options: dict | None = None, folders=None) -> list:
    """Like ``torchrun``, in threads; ``options`` of the last process are others."""

    def work(team):
        last = team.rank == size - 1
        wanted = ExtractOptions(**(options or {})) if last else ExtractOptions()
        sources = find_images([photos]) if team.leads else []
        here = (folders or {}).get(team.rank, out)
        return extract(Pipeline(PatchMeans(), Blocks()), sources, here, wanted, workers=team)

    return in_threads(size, work)


def test_results_of_pictures_whose_names_or_contents_changed(tmp_path) -> None:
    """Results are moved and replaced as by one process."""
    for name in ("photos", "more/photos"):
        for i in range(6):
            draw(tmp_path / name / f"{i}.png", 24, 40 + i)
    outs = {1: tmp_path / "one", 3: tmp_path / "three"}
    for size, out in outs.items():
        photos = tmp_path / ("photos" if size == 1 else "more/photos")
        alone(photos, out)
        draw(photos / "0.jpg", 32, 32)  # 0.safetensors becomes 0.png.safetensors
        draw(photos / "3.png", 48, 32)
        (photos / "4.png").write_text("no picture any more")
        report = alone(photos, out) if size == 1 else share(photos, out, size)[0]
        assert (len(report.done), len(report.skipped), len(report.failed)) == (2, 4, 1)
    maps = [
        {path.name: load_file(path)["features"].tolist() for path in out.glob("*.safetensors")}
        for out in outs.values()
    ]
    assert maps[0] == maps[1] and len(maps[0]) == 7
    assert {"0.png.safetensors", "4.safetensors"} < maps[1].keys()  # a failure removes nothing
    assert [r["output"] for r in records(outs[3])] == [r["output"] for r in records(outs[1])]


def test_processes_that_do_not_fit_together(photos, tmp_path) -> None:
    first, second = share(photos, tmp_path / "out", 2, {"dtype": "fp32"})
    assert "process 2 of 2 has other models or options than the first" in str(second)
    assert isinstance(first, ProcessError) and "process 2 of 2 has failed" in str(first)
    alone(photos, tmp_path / "out")  # goes on
    alone(photos, tmp_path / "one")
    assert visible(tmp_path / "out") == visible(tmp_path / "one")

    elsewhere = {1: tmp_path / "elsewhere"}
    first, second = share(photos, tmp_path / "disk", 2, folders=elsewhere)
    assert isinstance(second, OutputError) and "into one and the same folder?" in str(second)
    assert isinstance(first, ProcessError)


def test_more_processes_than_pictures(tmp_path) -> None:
    draw(tmp_path / "photos/a.png")
    first, *others = share(tmp_path / "photos", tmp_path / "out", 3)
    assert len(first.done) == 1 and all(not other.done for other in others)
    assert list(visible(tmp_path / "out")) == ["a.safetensors"]


def test_frames_of_a_video_are_shared(tmp_path) -> None:
    sources = find_images([film(tmp_path / "clip.avi", 9), draw(tmp_path / "a.png")], videos=True)
    sources = with_frames(sources, scan_videos(sources, Span(every=2)))
    extract(Pipeline(PatchMeans(), Blocks()), sources, tmp_path / "one")

    def work(team: Workers):
        pipeline = Pipeline(PatchMeans(), Blocks(), workers=1)
        return extract(pipeline, sources if team.leads else [], tmp_path / "two", workers=team)

    report, _, _ = in_threads(3, work)
    assert len(report.done) == 6 and not report.failed
    assert visible(tmp_path / "two") == visible(tmp_path / "one")
    assert records(tmp_path / "two") == records(tmp_path / "one")
