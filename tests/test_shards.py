"""``extract --shard-size``: tar files that WebDataset reads, resumed, and read back."""

from __future__ import annotations

import json
import pickle
import tarfile
from pathlib import Path

import pytest
import torch
from drawn import Blocks, PatchMeans, draw
from test_extract import files, manifest, run

import fmupsample
from fmupsample.errors import FeaturesError, UsageError
from fmupsample.images import find_images
from fmupsample.jobs.extract import ExtractOptions
from fmupsample.pipeline import Pipeline
from fmupsample.runs import engine as module
from fmupsample.runs.shards import sample_keys
from fmupsample.upsamplers import load_upsampler

SHARDS = ExtractOptions(shard_size=3)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("a.png", "a.jpg", "sub/b.v2.png", "c.png", "d.png", "é☃.png", "n" * 200 + ".png"):
        draw(tmp_path / "photos" / name)
    return tmp_path / "photos"


def samples(tar: Path) -> list[str]:
    with tarfile.open(tar) as opened:
        return opened.getnames()


def test_tar_files_by_the_convention(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = run(photos, out, SHARDS)
    assert len(report.done) == 7 and report.options["shards"] is True
    assert files(out) == {f"features-00000{n}.tar" for n in range(3)}
    names = [name for tar in sorted(out.glob("*.tar")) for name in samples(tar)]
    # Pairs that follow each other; a key is all before the first dot of the last part.
    keys = [str(Path(n).parent / Path(n).name.partition(".")[0]) for n in names]
    assert keys[::2] == keys[1::2] and len(set(keys)) == 7
    assert {n.rpartition(".")[2] for n in names} == {"json", "safetensors"}
    assert {"a_png", "a_jpg", "sub/b_v2", "é☃"} < set(keys)
    assert [len(samples(tar)) for tar in sorted(out.glob("*.tar"))] == [6, 6, 2]
    assert all(tar.stat().st_size % 512 == 0 for tar in out.glob("*.tar"))
    for record in manifest(out).values():
        with tarfile.open(out / record["output"]) as tar:
            stored = json.load(tar.extractfile(record["key"] + ".json"))
        assert stored["source"] == record["source"] and stored["shape"] == [6, 32, 48]
    # the same from any order of pictures, at any time
    run(photos, tmp_path / "again", SHARDS)
    for tar in out.glob("*.tar"):
        assert tar.read_bytes() == (tmp_path / "again" / tar.name).read_bytes()


@pytest.mark.parametrize(
    ("options", "upsampler"),
    [
        ({}, None),
        ({"format": "npy", "dtype": "fp32"}, None),
        ({"format": "safetensors", "dtype": "bf16"}, None),
        ({"format": "compact", "weight_bits": 8}, "jbu"),
        ({"tokens_only": True, "pca": 2}, None),
    ],
)
def test_read_back(photos: Path, tmp_path: Path, options: dict, upsampler: str | None) -> None:
    method = load_upsampler(PatchMeans(), upsampler) if upsampler else Blocks()
    one = run(photos, tmp_path / "files", ExtractOptions(**options), upsampler=method)
    run(photos, tmp_path / "tars", ExtractOptions(**options, shard_size=4), upsampler=method)
    shards = pickle.loads(pickle.dumps(fmupsample.open_shards(tmp_path / "tars")))
    assert len(shards) == 7 and "7 samples in 2 files" in repr(shards)
    by_source = {shards.info(key)["source"]: key for key in shards}
    for record in one.done:
        alone = fmupsample.open(tmp_path / "files" / record["output"])
        inside = shards[by_source[record["source"]]]
        assert inside.shape == alone.shape and type(inside) is type(alone)
        assert torch.equal(inside.full(), alone.full())
        assert torch.equal(inside[:, 1:3, 2], alone[:, 1:3, 2])
        if options.get("format") != "npy":
            assert inside.frame == alone.frame
    only = fmupsample.open_shards(tmp_path / "tars/features-000001.tar")
    assert set(only) < set(shards) and len(only) == 3


def test_repeated_and_changed_pictures(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(photos, out, SHARDS)
    before = {tar.name: tar.read_bytes() for tar in out.glob("*.tar")}
    backbone = PatchMeans()
    again = run(photos, out, SHARDS, pipeline=Pipeline(backbone, Blocks()))
    assert len(again.skipped) == 7 and again.done == [] and backbone.batches == []
    assert {tar.name: tar.read_bytes() for tar in out.glob("*.tar")} == before

    # One that changed: the others of its shard move, unchanged; its old sample is gone.
    old = fmupsample.open_shards(out)["c"].full()
    neighbours = {r["key"] for r in manifest(out).values() if r["output"] == _shard_of(out, "c")}
    draw(photos / "c.png", 40, 80)
    third = run(photos, out, SHARDS)
    assert [r["relative"] for r in third.done] == ["c.png"] and len(third.skipped) == 6
    assert not (out / "features-000000.tar").exists() or "c" not in neighbours
    shards = fmupsample.open_shards(out)
    assert len(shards) == 7 and shards["c"].shape == (6, 32, 64) != old.shape
    assert sum(samples(tar).count("c.json") for tar in out.glob("*.tar")) == 1
    _agrees(out)
    # A new one goes into a shard of its own; a shard that is cut off is done again.
    draw(photos / "new.png")
    assert [r["relative"] for r in run(photos, out, SHARDS).done] == ["new.png"]
    broken = out / _shard_of(out, "new")
    broken.write_bytes(broken.read_bytes()[:700])
    assert [r["relative"] for r in run(photos, out, SHARDS).done] == ["new.png"]
    assert len(run(photos, out, SHARDS, overwrite=True).done) == 8
    _agrees(out)


def _shard_of(out: Path, key: str) -> str:
    return next(r["output"] for r in manifest(out).values() if r.get("key") == key)


def _agrees(out: Path) -> None:
    """The manifest and the shards say the same."""
    listed = {(r["output"], r["key"]) for r in manifest(out).values() if r["status"] == "ok"}
    there = {
        (tar.name, name.removesuffix(".json"))
        for tar in out.glob("*.tar")
        for name in samples(tar)
        if name.endswith(".json")
    }
    assert listed == there
    assert list(out.glob(".*")) == []


def test_an_interrupted_shard_grows_on(photos: Path, tmp_path: Path, monkeypatch) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    run(photos, whole, SHARDS)
    real, seen = module.Run._make, []

    def one(self, item, *more) -> None:
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(item)
        real(self, item, *more)

    monkeypatch.setattr(module.Run, "_make", one)
    with pytest.raises(KeyboardInterrupt):
        run(photos, out, SHARDS)
    monkeypatch.setattr(module.Run, "_make", real)
    finished = len([r for r in manifest(out).values() if r["status"] == "ok"])
    assert finished >= 3 and len(fmupsample.open_shards(out)) == 3  # whole shards only
    assert len(run(photos, out, SHARDS).skipped) == finished
    assert {p.name: p.read_bytes() for p in out.glob("*.tar")} == {
        p.name: p.read_bytes() for p in whole.glob("*.tar")
    }


def test_bad_pictures_leave_no_sample(photos: Path, tmp_path: Path) -> None:
    (photos / "bad.png").write_text("no picture")
    out = tmp_path / "out"
    report = run(photos, out, SHARDS)
    assert len(report.done) == 7 and manifest(out)["bad.png"]["status"] == "failed"
    _agrees(out)
    draw(photos / "bad.png")
    assert [r["relative"] for r in run(photos, out, SHARDS).done] == ["bad.png"]
    _agrees(out)


def test_files_and_shards_do_not_mix(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "files")
    with pytest.raises(UsageError, match=r"shards None \(now True\)"):
        run(photos, tmp_path / "files", SHARDS)
    run(photos, tmp_path / "tars", SHARDS)
    with pytest.raises(UsageError, match=r"shards True \(now None\)"):
        run(photos, tmp_path / "tars")
    assert len(run(photos, tmp_path / "tars", ExtractOptions(shard_size=5)).skipped) == 7
    for options, said in (
        (ExtractOptions(shard_size=0), "a shard of 0 pictures"),
        (ExtractOptions(shard_size=2, format="pt"), "no pt files"),
    ):
        with pytest.raises(UsageError, match=said):
            run(photos, tmp_path / "more", options)


def test_keys(photos: Path) -> None:
    draw(photos / "x.1.png")
    draw(photos / "x_1.png")
    sources = find_images([photos])
    keys = sample_keys(sources, ".npy", ["A_JPG"])
    named = dict(zip((str(s.relative) for s in sources), keys, strict=True))
    assert named["a.png"] == "a_png" and named["a.jpg"] == "a_jpg~2"
    assert sorted([named["x.1.png"], named["x_1.png"]]) == ["x_1", "x_1~2"]
    assert not any("." in Path(key).name for key in keys)


def test_shards_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FeaturesError, match=r"no shard features-\*\.tar"):
        fmupsample.open_shards(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"no tar" * 200)
    for where in (tmp_path / "a.tar", tmp_path / "none.tar", [tmp_path]):
        with pytest.raises(FeaturesError, match="is not a readable shard"):
            fmupsample.open_shards(where)
    with pytest.raises(FeaturesError, match=r"use fmupsample\.open_shards"):
        fmupsample.open(tmp_path / "a.tar")


def test_samples_of_sources_that_are_away_stay(tmp_path: Path) -> None:
    disk, links, out = tmp_path / "disk", tmp_path / "links", tmp_path / "out"
    links.mkdir()
    for name in ("a.png", "b.png", "c.png", "d.png"):
        draw(disk / name)
        (links / name).symlink_to(disk / name)
    run(links, out, SHARDS)
    before = {name: (out / name).read_bytes() for name in files(out)}
    disk.rename(tmp_path / "away")
    assert len(run(links, out, SHARDS).failed) == 4
    assert {name: (out / name).read_bytes() for name in files(out)} == before
    (tmp_path / "away").rename(disk)
    assert len(run(links, out, SHARDS).skipped) == 4


def test_samples_of_a_lost_manifest_are_recognised(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(photos, out, SHARDS)
    before = {name: (out / name).read_bytes() for name in files(out)}
    known = manifest(out)
    (out / "manifest.jsonl").unlink()
    assert len(run(photos, out, SHARDS).skipped) == 7
    assert {name: (out / name).read_bytes() for name in files(out)} == before
    for relative, record in manifest(out).items():
        assert record == {k: v for k, v in known[relative].items() if k != "seconds"}
    (out / "manifest.jsonl").unlink()
    with pytest.raises(UsageError, match="made with other options"):
        run(photos, out, ExtractOptions(shard_size=3, dtype="fp32"))


def test_prune_drops_samples_of_sources_that_are_gone(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(photos, out, SHARDS)
    (photos / "c.png").unlink()
    run(photos, out, SHARDS)
    assert len(fmupsample.open_shards(out)) == 7
    run(photos, out, SHARDS, prune=True)
    found = fmupsample.open_shards(out)
    assert len(found) == 6 and "c" not in found
    assert all((out / record["output"]).is_file() for record in manifest(out).values())
