"""A run goes on after a power failure at any moment, and ends as if there had been none."""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path

import pytest
from drawn import draw
from power import Disk, put
from test_extract import files, manifest, run

from fmupsample import open_shards
from fmupsample.jobs.extract import ExtractOptions
from fmupsample.runs.manifest import Manifest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/fd")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i in range(4):
        draw(tmp_path / "photos" / ("deep" if i == 2 else ".") / f"{i}.png", 16 + i, 24)
    return tmp_path / "photos"


def states(photos: Path, out: Path, options: ExtractOptions, monkeypatch) -> list:
    with monkeypatch.context() as patch:
        disk = Disk(out, patch)
        run(photos, out, options)
    unlike = {tuple(sorted(state.items())): state for state in disk.states}
    assert len(unlike) > 12
    return list(unlike.values())


def maps(folder: Path) -> dict[str, bytes]:
    """The samples of all shards, by picture."""
    shards = open_shards(folder)
    return {shards.info(key)["relative"]: shards[key].full().numpy().tobytes() for key in shards}


def members(shard: Path) -> int:
    with tarfile.open(shard) as tar:
        return len(tar.getnames())


@pytest.mark.parametrize("format", ["safetensors", "npy"])
def test_files(photos: Path, tmp_path: Path, monkeypatch, format: str) -> None:
    options, whole = ExtractOptions(format=format), tmp_path / "whole"
    left = states(photos, whole, options, monkeypatch)
    expected = {name: (whole / name).read_bytes() for name in files(whole)}
    for number, state in enumerate(left):
        out = tmp_path / f"out{number}"
        put(state, out)
        report = run(photos, out, options)
        assert not report.failed and len(report.done) + len(report.skipped) == 4
        assert {name: (out / name).read_bytes() for name in files(out)} == expected
        assert {r["status"] for r in manifest(out).values()} == {"ok"}


def test_shards(photos: Path, tmp_path: Path, monkeypatch) -> None:
    options, whole = ExtractOptions(shard_size=2), tmp_path / "whole"
    left = states(photos, whole, options, monkeypatch)
    expected = maps(whole)
    for number, state in enumerate(left):
        out = tmp_path / f"out{number}"
        put(state, out)
        report = run(photos, out, options)
        assert not report.failed and len(report.done) + len(report.skipped) == 4
        assert sum(map(members, out.glob("*.tar"))) == 2 * 4  # none of them twice
        assert maps(out) == expected


def test_lines_of_zeros_are_dropped(tmp_path: Path) -> None:
    first = Manifest(tmp_path)
    for name in "abc":
        first.append({"source": name, "status": "ok", "output": name})
    first.close(compact=False)
    lines = first.path.read_bytes().splitlines(keepends=True)
    torn = lines[1][:9] + bytes(40) + lines[1][20:]
    first.path.write_bytes(lines[0] + torn + lines[2] + bytes(100))
    assert set(Manifest(tmp_path).records) == {"a", "c"}
