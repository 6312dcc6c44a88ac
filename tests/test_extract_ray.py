"""``extract --ray``: a cluster ends with the files of one process; nothing needs Ray but this."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import cv2
import pytest
from drawn import Blocks, PatchMeans, cut, draw, film
from sharing import records, visible

from fmupsample import open_shards
from fmupsample.errors import ProcessError, UsageError
from fmupsample.images import find_images
from fmupsample.jobs.extract import ExtractOptions, extract
from fmupsample.pipeline import Pipeline
from fmupsample.runs.ray import RayCluster
from fmupsample.video import scan_videos, with_frames
from fmupsample_cli import loading
from fmupsample_cli.main import main

PICTURES = 18


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(PICTURES):
        draw(folder / ("deep" if i % 3 == 0 else ".") / f"{i:02}.png", 16 + i, 40)
    (folder / "bad.jpg").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def cluster():
    """A Ray of two processors in this machine; its workers see the modules of the tests."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield RayCluster()
    ray.shutdown()


def run(photos: Path, out: Path, cluster: RayCluster | None = None, **options):
    pipeline = Pipeline(PatchMeans(), Blocks())
    return extract(pipeline, find_images([photos]), out, ExtractOptions(**options), cluster=cluster)


def test_a_cluster_writes_the_files_of_one_process(cluster, photos, tmp_path, monkeypatch, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    run(photos, one, pca=2)
    monkeypatch.setattr(loading, "load_models", lambda *_, **__: (PatchMeans(), Blocks()))
    command = [
        "extract",
        photos,
        "-o",
        two,
        "--pca",
        2,
        "--json",
        "--device",
        "cpu",
        "--ray",
        "auto",
    ]
    command = [str(word) for word in command]
    assert main(command) == 3
    said = capsys.readouterr()
    summary = json.loads(said.out)
    assert (summary["done"], summary["failed"]) == (PICTURES, 1)
    assert said.err.count("bad.jpg is not a picture") == 1
    assert f"extracting on Ray: {PICTURES + 1}/{PICTURES + 1} pictures" in said.err
    assert visible(two) == visible(one) and records(two) == records(one)

    # The next run finds what this one has done, with Ray or without.
    (two / "05.safetensors").unlink()
    assert main([*command, "-q"]) == 3
    summary = json.loads(capsys.readouterr().out)
    assert (summary["done"], summary["skipped"], summary["failed"]) == (1, PICTURES - 1, 1)
    assert len(run(photos, two, pca=2).skipped) == PICTURES
    assert visible(two) == visible(one) and records(two) == records(one)


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos, one of which breaks off, a file that is no video, and a picture."""
    folder = tmp_path_factory.mktemp("films")
    film(folder / "deep/a.mp4", 21)
    cut(film(folder / "b.avi", 20), 0.8)
    (folder / "bad.mp4").write_text("no video")
    draw(folder / "b.png")
    return folder


@pytest.mark.parametrize("more", [["--pca", "1"], ["--shard-size", "4"]])
def test_videos(cluster, films, tmp_path, monkeypatch, capsys, more):
    """Their frames are pictures of the run, wherever they are computed."""
    monkeypatch.setattr(loading, "load_models", lambda *_, **__: (PatchMeans(), Blocks()))
    every = ["--every", "2", "--from", "0.1", "--device", "cpu", "--json"]

    def summary_of(out: Path, *way: str) -> dict:
        assert main(["extract", str(films), "-o", str(out), *every, *more, *way]) == 3
        said = capsys.readouterr()
        assert ("extracting on Ray" in said.err) == bool(way)
        summary = json.loads(said.out.replace(str(out), "OUT"))
        times = ("seconds", "pictures_per_second")
        return {key: value for key, value in summary.items() if key not in times}

    one, two = tmp_path / "one", tmp_path / "two"
    alone = summary_of(one)
    assert 10 + 1 + 2 < alone["done"] < 10 + 1 + 10 and alone["failed"] == 1
    assert [bool(video["breaks_off"]) for video in alone["videos"]] == [True, False, False]
    together = summary_of(two, "--ray", "auto")
    if "--pca" in more:
        assert together == alone
        assert visible(two) == visible(one) and records(two) == records(one)
    else:  # whose shards are divided in another way
        assert samples(two) == samples(one)
    again = summary_of(two)
    assert (again["done"], again["skipped"]) == (0, alone["done"])


class Counting(PatchMeans):
    """Notes, in a worker, each time that a video is opened."""

    def __init__(self, opened: Path) -> None:
        super().__init__()
        self.opened = opened

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        capture = cv2.VideoCapture

        def noted(*arguments):
            with self.opened.open("a") as file:
                file.write("x")
            return capture(*arguments)

        cv2.VideoCapture = noted


def test_a_worker_goes_on_where_it_was_in_a_video(cluster, tmp_path):
    """It does not begin anew with each row, which would decode long videos many times."""
    sources = find_images([film(tmp_path / "a.avi", 28)], videos=True)
    sources = with_frames(sources, scan_videos(sources))
    opened = tmp_path / "opened"
    report = extract(
        Pipeline(Counting(opened), Blocks()), sources, tmp_path / "out", cluster=cluster
    )
    assert len(report.done) == 28
    # Eight rows; either of two workers opens it once, and again if Ray's order is another.
    assert 1 <= len(opened.read_text()) <= 4


def samples(out: Path) -> dict[str, tuple]:
    """What is in the shards, whichever of them it is in."""
    shards = open_shards(out)
    return {key: (shards.info(key), shards[key].full().tolist()) for key in shards}


def test_shards(cluster, photos, tmp_path):
    run(photos, tmp_path / "one", shard_size=4)
    report = run(photos, tmp_path / "two", cluster, shard_size=4)
    assert len(report.done) == PICTURES and len(report.failed) == 1
    assert samples(tmp_path / "two") == samples(tmp_path / "one")
    names = sorted(path.name for path in (tmp_path / "two").glob("*.tar"))
    assert names == [f"features-{i:06}.tar" for i in range(5)]


class Dying(PatchMeans):
    """Ends its process, once, in the middle of a run."""

    def __init__(self, marker: Path) -> None:
        super().__init__()
        self.marker = marker

    def forward(self, images):
        if len(self.batches) == 2 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)


class Broken(PatchMeans):
    def forward(self, images):
        raise ZeroDivisionError("no such luck")


def test_workers_that_die_and_workers_that_fail(cluster, photos, tmp_path):
    """What a dead one has begun is done again; what is wrong with the code ends the run."""
    run(photos, tmp_path / "one")
    sources = find_images([photos])
    dying = Pipeline(Dying(tmp_path / "marker"), Blocks())
    report = extract(dying, sources, tmp_path / "two", cluster=cluster)
    assert (tmp_path / "marker").exists()
    assert len(report.done) == PICTURES and len(report.failed) == 1
    assert records(tmp_path / "two") == records(tmp_path / "one")
    for path in (tmp_path / "two").rglob(".*"):  # which the next run removes
        assert path.name.endswith(".part")
    run(photos, tmp_path / "two")
    assert visible(tmp_path / "two") == visible(tmp_path / "one")

    with pytest.raises(ProcessError, match=r"a worker .* has failed: .*no such luck"):
        extract(Pipeline(Broken(), Blocks()), sources, tmp_path / "three", cluster=cluster)
    assert run(photos, tmp_path / "three").done


def test_without_ray(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    assert main(["extract", str(photos), "-o", str(tmp_path / "out"), "--ray", "auto"]) == 2
    assert "pip install 'fmupsample[ray]'" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"pip install 'fmupsample\[ray\]'"):
        run(photos, tmp_path / "out", RayCluster())
    assert not (tmp_path / "out").exists()


def test_a_cluster_that_is_not_there(photos, tmp_path):
    ray = pytest.importorskip("ray")
    ray.shutdown()
    for address in ("auto", "127.0.0.1:9"):
        with pytest.raises(ProcessError, match="cannot be reached"):
            run(photos, tmp_path / "out", RayCluster(address))
