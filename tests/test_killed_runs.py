"""Runs that are killed, again and again, end with the files of one that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from drawn import Blocks, PatchMeans, draw
from killing import Runs

from fmupsample import open_shards
from fmupsample.errors import OutputError
from fmupsample.images import find_images
from fmupsample.jobs.extract import extract
from fmupsample.pipeline import Pipeline

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")

PICTURES = 18
WAYS = {
    "whole maps": [],
    "tokens as npy": ["--tokens-only", "--format", "npy"],
    "compact": ["--format", "compact", "--upsampler", "jbu", "--weight-bits", "8"],
    "pca": ["--pca", "2"],
    "shards": ["--shard-size", "4"],
}


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    with Runs() as started:
        started.run("--version")  # everything is imported when the first of them is timed
        yield started


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(PICTURES):
        draw(folder / ("deep" if i % 3 == 0 else ".") / f"{i:02}.png", 16 + i, 40)
    (folder / "bad.jpg").write_text("no picture")
    return folder


def visible(out: Path) -> dict[str, bytes]:
    """Every file with a final name."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and not path.name.startswith(".") and path.name != "manifest.jsonl"
    }


def records(out: Path) -> list[dict]:
    lines = (out / "manifest.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.mark.parametrize("way", WAYS)
def test_killed_at_random_moments(way: str, runs: Runs, photos: Path, tmp_path: Path) -> None:
    """Kills before a chosen file operation, in the middle of a write, or by the clock."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = [*WAYS[way], "--device", "cpu", "-q"]
    began = time.monotonic()
    code, said, moments = runs.run("extract", photos, "-o", whole, *options)
    took = time.monotonic() - began
    assert code == 3 and "bad.jpg is not a picture" in said  # the others are there
    expected = visible(whole)
    number = -(-PICTURES // 4) if "--shard-size" in options else PICTURES
    assert len(expected) == number + ("--pca" in options)

    rng = random.Random(way)
    kills = 0
    finished: dict[str, object] = {}  # pictures that some run had finished: when, or where
    while kills < 8:
        by_clock = kills % 4 == 3
        moment = None if by_clock else rng.randrange(1, moments // 8)
        process = runs.begin("extract", photos, "-o", out, *options, moment=moment)
        if by_clock:
            time.sleep(rng.uniform(0, took / 2))
            os.kill(process, signal.SIGKILL)
        code, said, _ = runs.end()
        assert "Traceback" not in said and "error" not in said
        if code != -signal.SIGKILL:
            assert code == 3, said
            break  # it was done before its moment came
        kills += 1
        if not out.exists():
            continue
        # Whatever has its final name is whole, and nothing that was finished is done again.
        there = visible(out)
        assert there.items() <= expected.items()
        now = _finished_so_far(out)
        assert finished.items() <= now.items(), "something was lost, or done twice"
        finished = now
    assert kills >= 3
    code, said, _ = runs.run("extract", photos, "-o", out, *options)
    assert code == 3, said
    assert visible(out) == expected
    assert records(out) == records(whole)
    assert list(out.rglob(".*")) == []


def _finished_so_far(out: Path) -> dict[str, object]:
    """What a killed run has recorded as finished; the last line may be torn."""
    if not (out / "manifest.jsonl").exists():
        return {}
    lines = (out / "manifest.jsonl").read_bytes().rpartition(b"\n")[0].splitlines()
    latest = {record["source"]: record for record in map(json.loads, lines)}
    return {
        source: (record["output"], record["offset"])
        if "offset" in record
        else (out / record["output"]).stat().st_mtime_ns
        for source, record in latest.items()
        if record["status"] == "ok"
    }


def test_killed_while_shards_are_repacked(runs: Runs, tmp_path: Path) -> None:
    """Pictures have changed: their old samples go, the others of their shards move."""
    photos, out, whole = (tmp_path / name for name in ("photos", "out", "whole"))
    for i in range(10):
        draw(photos / f"{i}.png", 16, 24 + i)
    command = ("extract", photos, "-q", "--shard-size", 3, "-o")
    assert runs.run(*command, out)[0] == 0
    for i in (1, 4, 9):
        draw(photos / f"{i}.png", 40, 40 + i)
    code, _, moments = runs.run(*command, whole)
    assert code == 0
    rng, kills = random.Random("repacked"), 0
    while kills < 8:
        code, said, _ = runs.run(*command, out, moment=rng.randrange(1, moments // 4))
        assert code in (0, -signal.SIGKILL), said
        if code == 0:
            break
        kills += 1
        shards = open_shards(out)  # nothing that has its name is less than whole
        assert all(shards[key].full().isfinite().all() for key in shards)
    assert kills >= 3
    assert runs.run(*command, out)[0] == 0
    found, expected = open_shards(out), open_shards(whole)
    assert set(found) == set(expected) and len(found) == 10
    for key in expected:
        assert found.info(key) == expected.info(key)
        assert torch.equal(found[key].full(), expected[key].full())
    assert sum(len(open_shards(tar)) for tar in out.glob("*.tar")) == 10  # nothing outdated
    assert list(out.rglob(".*")) == []


def test_two_runs_at_once(runs: Runs, photos: Path, tmp_path: Path) -> None:
    """The second says so in a sentence and touches nothing."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert runs.run("extract", photos, "-o", whole, "-q")[0] == 3
    process = runs.begin("extract", photos, "-o", out, "-q", moment=30, stop=True)
    try:
        before = visible(out)
        assert 1 < len(before) < PICTURES
        with pytest.raises(OutputError) as refused:
            extract(Pipeline(PatchMeans(), Blocks()), find_images([photos]), out, overwrite=True)
        assert str(refused.value) == f"another run is writing into {out}; wait for it"
        assert visible(out) == before and (out / ".fmupsample.lock").exists()
    finally:
        os.kill(process, signal.SIGCONT)
    assert runs.end()[0] == 3
    assert visible(out) == visible(whole)
    assert list(out.rglob(".*")) == []
