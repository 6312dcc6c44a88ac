"""Extraction as a whole: results, manifest, resuming, disk space, interruption."""

from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drawn import Blocks, NotLinear, PatchMeans, draw
from safetensors import safe_open
from safetensors.torch import load_file

from fmupsample.errors import OutputError, UsageError
from fmupsample.images import Frame, ImageSize, find_images
from fmupsample.jobs.extract import ExtractOptions, extract
from fmupsample.jobs.projection import Projection, ProjectionFit
from fmupsample.pipeline import Pipeline
from fmupsample.runs import engine as module
from fmupsample.upsamplers import load_upsampler


class Watch:
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.stages: list[list] = []
        self.warnings: list[str] = []

    def start(self, total: int, label: str) -> None:
        self.stages.append([label, total, 0])

    def advance(self, steps: int = 1) -> None:
        self.stages[-1][2] += steps

    def describe(self, label: str) -> None: ...

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("a.png", "a.jpg", "sub/b.png", "c.png"):
        draw(tmp_path / "photos" / name)
    return tmp_path / "photos"


def run(photos: Path, out: Path, options=None, *, upsampler=None, pipeline=None, **more):
    given = {k: more.pop(k) for k in ("image_size", "fit", "batch_size") if k in more}
    pipeline = pipeline or Pipeline(PatchMeans(), upsampler or Blocks(), **given)
    return extract(pipeline, find_images([photos], exclude=[out]), out, options, **more)


def manifest(out: Path) -> dict[str, dict]:
    lines = (out / "manifest.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len({r["source"] for r in records}) == len(records)
    return {r["relative"]: r for r in records}


def files(out: Path) -> set[str]:
    return {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} - {"manifest.jsonl"}


def test_results_and_manifest(photos: Path, tmp_path: Path) -> None:
    out, watch, said = tmp_path / "out", Watch(), []
    report = run(photos, out, progress=watch, say=said.append, fit="pad")
    expected = {"a.png.safetensors", "a.jpg.safetensors", "sub/b.safetensors", "c.safetensors"}
    assert files(out) == expected
    assert (len(report.done), report.failed, report.skipped) == (4, [], [])
    assert watch.stages == [["extracting", 4, 4]] and watch.warnings == []
    assert len(said) == 1 and "4 pictures" in said[0] and "free" in said[0]

    record = manifest(out)["sub/b.png"]
    assert record["status"] == "ok" and record["output"] == "sub/b.safetensors"
    assert record["source"] == str(photos / "sub/b.png")
    assert record["shape"] == [6, 32, 48] and record["dtype"] == "fp16"
    assert Frame.from_json(record["frame"]) == Frame((40, 60), (32, 48), (32, 48))
    assert record["options"]["backbone"] == "patch-means.v1"
    assert record["options"]["upsampler_fingerprint"] == "blocks"
    path = out / record["output"]
    assert record["bytes"] == path.stat().st_size
    with safe_open(path, framework="pt") as file:
        meta, features = file.metadata(), file.get_tensor("features")
    assert features.dtype == torch.float16 and list(features.shape) == record["shape"]
    assert meta["source"] == record["source"] and json.loads(meta["frame"]) == record["frame"]
    assert json.loads(meta["options"]) == record["options"]
    assert features[0, 0, 0] < -1.4 and features[0, 0, -1] > 1.4  # red grows to the right


def test_a_second_run_does_nothing_and_a_changed_picture_is_redone(photos, tmp_path) -> None:
    out = tmp_path / "out"
    run(photos, out)
    times = {name: (out / name).stat().st_mtime_ns for name in files(out)}
    backbone = PatchMeans()
    again = run(photos, out, pipeline=Pipeline(backbone, Blocks()))
    assert len(again.skipped) == 4 and again.done == [] and backbone.batches == []
    assert {name: (out / name).stat().st_mtime_ns for name in files(out)} == times

    draw(photos / "c.png", 40, 80)
    (out / "sub/b.safetensors").write_bytes(b"cut")
    (out / "a.jpg.safetensors").unlink()
    third = run(photos, out)
    assert {r["relative"] for r in third.done} == {"c.png", "sub/b.png", "a.jpg"}
    assert len(third.skipped) == 1 and len(manifest(out)) == 4
    assert manifest(out)["c.png"]["shape"] == [6, 32, 64]


def test_names_follow_todays_pictures_without_redoing(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(photos / "c.png", out)
    assert files(out) == {"c.safetensors"}
    draw(photos / "c.bmp")
    report = run(photos, out)
    assert "c.png.safetensors" in files(out) and "c.safetensors" not in files(out)
    assert [r["relative"] for r in report.skipped] == ["c.png"]
    assert manifest(out)["c.png"]["output"] == "c.png.safetensors"


def test_other_options_need_overwrite(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(photos, out)
    before = files(out)
    for change in (
        {"options": ExtractOptions(dtype="fp32")},
        {"image_size": ImageSize(short=64)},
        {"upsampler": NotLinear()},
    ):
        with pytest.raises(UsageError, match=r"made with other options: .*now .*--overwrite"):
            run(photos, out, **change)
    with pytest.raises(UsageError, match=r"image size 32 \(now 64\)"):
        run(photos, out, image_size=ImageSize(short=64))
    assert files(out) == before
    report = run(photos, out, ExtractOptions(format="npy"), overwrite=True)
    assert len(report.done) == 4
    assert files(out) == {n.replace(".safetensors", ".npy") for n in before}  # no stale files


def test_files_of_others_are_never_overwritten(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "c.npy").write_text("precious")
    with pytest.raises(UsageError, match=r"c\.npy exists and is not a result recorded"):
        run(photos, out, ExtractOptions(format="npy"))
    assert files(out) == {"c.npy"}
    # the result of a picture in another folder, same name
    other = tmp_path / "other"
    run(draw(other / "c.png"), tmp_path / "out2")
    with pytest.raises(UsageError, match=r"is the result of .*other/c.png, now wanted for"):
        run(photos, tmp_path / "out2")


def test_one_output_folder_inside_the_input(photos: Path) -> None:
    out = photos / "features"
    assert len(run(photos, out).done) == 4
    assert len(run(photos, out).skipped) == 4


def test_a_picture_called_like_our_own_files(tmp_path: Path) -> None:
    draw(tmp_path / "in/pca.png")
    report = run(tmp_path / "in", tmp_path / "out", ExtractOptions(pca=2))
    assert report.done[0]["output"] == "pca.png.safetensors"


def test_bad_pictures_are_reported_and_retried(photos: Path, tmp_path: Path) -> None:
    (photos / "bad.jpg").write_text("no picture")
    out, watch = tmp_path / "out", Watch()
    report = run(photos, out, progress=watch)
    assert len(report.done) == 4 and len(report.failed) == 1
    assert len(watch.warnings) == 1 and "bad.jpg is not a picture" in watch.warnings[0]
    assert watch.stages == [["extracting", 5, 5]]
    record = manifest(out)["bad.jpg"]
    assert record["status"] == "failed" and "not a picture" in record["error"]
    draw(photos / "bad.jpg")
    assert [r["relative"] for r in run(photos, out).done] == ["bad.jpg"]
    assert manifest(out)["bad.jpg"]["status"] == "ok"
    # gone bad later: a failure takes nothing away
    before = files(out)
    (photos / "bad.jpg").write_text("no picture")
    assert len(run(photos, out).failed) == 1
    assert files(out) == before and manifest(out)["bad.jpg"]["status"] == "ok"


@pytest.fixture
def links(tmp_path: Path) -> Path:
    """Links to photographs on a "disk" that can go away."""
    for name in ("a.png", "b.png", "c.png"):
        draw(tmp_path / "disk" / name)
        (tmp_path / "links").mkdir(exist_ok=True)
        (tmp_path / "links" / name).symlink_to(tmp_path / "disk" / name)
    return tmp_path / "links"


def test_results_of_sources_that_are_away_stay(links: Path, tmp_path: Path) -> None:
    out, disk = tmp_path / "out", tmp_path / "disk"
    run(links, out)
    before = {name: (out / name).read_bytes() for name in files(out)}
    disk.rename(tmp_path / "away")
    report = run(links, out)
    assert len(report.failed) == 3 and not report.done
    assert {name: (out / name).read_bytes() for name in files(out)} == before
    (tmp_path / "away").rename(disk)
    assert len(run(links, out).skipped) == 3


def test_prune_deletes_results_of_sources_that_are_gone(links: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(links, out)
    (tmp_path / "disk/a.png").unlink()
    (links / "b.png").unlink()
    assert len(run(links, out).failed) == 1 and len(files(out)) == 3
    report = run(links, out, prune=True)
    assert len(report.failed) == 1 and len(report.skipped) == 1
    assert files(out) == {"c.safetensors"}
    assert {r["status"] for r in manifest(out).values()} == {"ok", "failed"}


def test_nothing_is_lost_by_overwriting_from_sources_that_are_away(
    links: Path, tmp_path: Path
) -> None:
    out, disk, half = tmp_path / "out", tmp_path / "disk", ExtractOptions(dtype="bf16")
    run(links, out)
    before = files(out)
    disk.rename(tmp_path / "away")
    assert len(run(links, out, half, overwrite=True).failed) == 3
    assert files(out) == before
    (tmp_path / "away").rename(disk)
    # The command goes on, and old results give way to the new ones.
    assert len(run(links, out, half).done) == 3
    assert files(out) == before
    assert all(load_file(out / name)["features"].dtype == torch.bfloat16 for name in before)


@pytest.mark.parametrize("upsampler", [Blocks(), NotLinear()])
def test_pca_is_the_pca_of_the_full_map(photos: Path, tmp_path: Path, upsampler) -> None:
    whole, few = tmp_path / "whole", tmp_path / "few"
    run(photos, whole, ExtractOptions(dtype="fp32"), upsampler=upsampler)
    report = run(photos, few, ExtractOptions(dtype="fp32", pca=2), upsampler=upsampler)
    assert report.explained == pytest.approx(1, abs=0.01)  # six channels made of three
    basis, _ = Projection.load(few / "pca.safetensors")
    for name in files(whole):
        full = load_file(whole / name)["features"]
        scores = load_file(few / name)["features"]
        assert scores.shape == (2, *full.shape[1:])
        torch.testing.assert_close(scores, basis.apply(full), rtol=1e-4, atol=1e-4)


def test_pca_basis_is_kept_for_pictures_added_later(photos: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "out", ExtractOptions(pca=2)
    run(photos, out, options)
    before = (out / "pca.safetensors").read_bytes()
    draw(photos / "new.png", 90, 40)
    report = run(photos, out, options)
    assert len(report.done) == 1 and len(report.skipped) == 4
    assert (out / "pca.safetensors").read_bytes() == before
    (out / "pca.safetensors").unlink()  # then the old scores mean nothing
    assert len(run(photos, out, options).done) == 5


def test_pca_of_bad_pictures_only_says_what_is_wrong_with_each(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no picture")
    report = run(tmp_path / "bad.png", tmp_path / "out", ExtractOptions(pca=2))
    assert "not a picture" in report.failed[0]["error"]


def test_projection_is_the_textbook_pca() -> None:
    tokens = torch.randn(500, 7, generator=torch.Generator().manual_seed(3)).double()
    tokens = tokens @ torch.diag(torch.arange(1, 8).double()) + 1000
    fit = ProjectionFit(7)
    for part in tokens.split(100):
        fit.add(part.T.reshape(7, 10, 10))
    fit.add(torch.full((7, 1, 1), float("nan")))
    basis = fit.solve(3)
    values, vectors = np.linalg.eigh(np.cov(tokens.numpy().T, bias=True))
    np.testing.assert_allclose(basis.variance, values[::-1][:3], rtol=1e-5)
    overlap = np.abs((basis.components.numpy() * vectors.T[::-1][:3]).sum(1))
    np.testing.assert_allclose(overlap, 1, atol=1e-5)
    assert basis.explained == pytest.approx(values[::-1][:3].sum() / values.sum())


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        (ExtractOptions(tokens_only=True), [6, 4, 6]),
        (ExtractOptions(output_size="original"), [6, 40, 60]),
        (ExtractOptions(output_size="x2"), [6, 8, 12]),
        (ExtractOptions(output_size="10x90", format="npy"), [6, 10, 90]),
        (ExtractOptions(output_size="20x20", format="pt", dtype="bf16"), [6, 20, 20]),
    ],
)
def test_sizes_and_formats(photos: Path, tmp_path: Path, options, shape) -> None:
    report = run(photos / "c.png", tmp_path / "out", options)
    assert report.done[0]["shape"] == shape
    path = tmp_path / "out" / report.done[0]["output"]
    if options.format == "npy":
        assert list(np.load(path).shape) == shape
    elif options.format == "pt":
        loaded = torch.load(path, weights_only=True)
        assert (
            list(loaded["features"].shape) == shape and loaded["features"].dtype == torch.bfloat16
        )
        assert loaded["meta"]["backbone"] == "patch-means.v1"


def test_tokens_only_needs_no_upsampler(photos: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(PatchMeans())
    report = run(photos, tmp_path / "out", ExtractOptions(tokens_only=True), pipeline=pipeline)
    assert report.options["upsampler"] is None
    with pytest.raises(UsageError, match="no upsampler"):
        run(photos, tmp_path / "out2", pipeline=pipeline)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ExtractOptions(format="npy", dtype="bf16"), "npy has no bf16"),
        (ExtractOptions(pca=7), "give 1 to 6"),
        (ExtractOptions(pca=0), "give 1 to 6"),
        (ExtractOptions(output_size="huge"), "not understood"),
        (ExtractOptions(tokens_only=True, output_size="x4"), "exclude each other"),
    ],
)
def test_options_that_cannot_be(photos: Path, tmp_path: Path, options, message) -> None:
    with pytest.raises(UsageError, match=message):
        run(photos, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_features_that_do_not_fit_the_dtype(photos: Path, tmp_path: Path) -> None:
    class Large(PatchMeans):
        factor = 1e6

        def forward(self, images):
            return super().forward(images) * self.factor

    def attempt(out: str, options: ExtractOptions):
        return run(photos / "c.png", tmp_path / out, options, pipeline=Pipeline(Large(), Blocks()))

    assert "beyond fp16; use --dtype bf16" in attempt("a", ExtractOptions()).failed[0]["error"]
    assert attempt("b", ExtractOptions(dtype="bf16")).failed == []
    Large.factor = float("nan")
    assert "NaN" in attempt("c", ExtractOptions(dtype="fp32")).failed[0]["error"]


def test_disk_space_is_checked_before_anything_starts(photos, tmp_path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 50_000))
    backbone = PatchMeans()
    with pytest.raises(OutputError) as caught:
        run(photos, tmp_path / "out", pipeline=Pipeline(backbone, Blocks()))
    message = str(caught.value)
    # 4 maps of 6 x 32 x 48 in fp16: 74 kB, and the headers
    assert "need 81.9 kB" in message and "50 kB free" in message
    assert "--output-size x4: " in message and "--tokens-only: " in message
    assert backbone.batches == [] and not (tmp_path / "out").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 83_000))
    run(photos, tmp_path / "out")


def test_results_that_are_replaced_make_room(photos, tmp_path, monkeypatch) -> None:
    run(photos, tmp_path / "out")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 20_000))
    assert len(run(photos, tmp_path / "out", overwrite=True).done) == 4


def test_interrupted_runs_go_on(photos: Path, tmp_path: Path, monkeypatch) -> None:
    out, watch = tmp_path / "out", Watch()
    real = module.Run._make
    seen = []

    def one(self, item, *more) -> None:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(item)
        real(self, item, *more)

    monkeypatch.setattr(module.Run, "_make", one)
    with pytest.raises(KeyboardInterrupt):
        run(photos, out, progress=watch)
    assert "of 4 pictures are finished; the same command goes on" in watch.warnings[-1]
    assert not list(out.rglob(".fmupsample*"))
    finished = sum(r["status"] == "ok" for r in manifest(out).values())
    monkeypatch.setattr(module.Run, "_make", real)
    report = run(photos, out)
    assert len(report.skipped) == finished and len(report.done) == 4 - finished


def test_odd_names(tmp_path: Path) -> None:
    names = ["new\nline.png", "[bold]x.png", "-o.png", "\N{SNOWMAN} ü.png", "\x1b[31mred.png"]
    for name in (*names, "by\udcfftes.png"):  # the last: a name that is not UTF-8
        draw(tmp_path / "in" / name)
    (tmp_path / "in" / "bad\n\x1b[2J.png").write_text("no picture")
    watch = Watch()
    report = run(tmp_path / "in", tmp_path / "out", progress=watch)
    assert len(report.done) == 6
    assert "bad\\n\\x1b[2J.png is not a picture" in watch.warnings[0]
    with safe_open(tmp_path / "out/by%FFtes.safetensors", framework="pt") as file:
        assert file.metadata()["source"].endswith("by\\udcfftes.png")
    assert len(run(tmp_path / "in", tmp_path / "out").skipped) == 6


def test_leftovers_are_tidied(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    for folder in (out, out / "sub"):
        (folder / ".fmupsample-123-0.part").write_text("half")
    run(photos, out)
    assert not list(out.rglob("*.part"))


def test_lower_precision_reassembles_in_it(photos: Path, tmp_path: Path, monkeypatch) -> None:
    from fmupsample.ops import reassembly

    seen = []
    real = reassembly.implementation

    def implementation(device):
        module = real(device)
        watched = SimpleNamespace(**vars(module))
        watched.reassemble = lambda value, *rest: (
            seen.append(value.dtype) or module.reassemble(value, *rest)
        )
        return watched

    monkeypatch.setattr(reassembly, "implementation", implementation)
    maps = {}
    for precision, dtype in (("fp32", "fp16"), ("bf16", "fp32"), ("bf16", "fp16")):
        seen.clear()
        backbone = PatchMeans()
        pipeline = Pipeline(backbone, load_upsampler(backbone, "jbu"), precision=precision)
        out = tmp_path / f"{precision}-{dtype}"
        run(photos, out, ExtractOptions(dtype=dtype), pipeline=pipeline)
        half = precision == "bf16" and dtype != "fp32"
        assert set(seen) == {torch.bfloat16 if half else torch.float32}
        maps[precision, dtype] = load_file(out / min(files(out)))["features"].float()
    exact, rounded = maps["bf16", "fp32"], maps["bf16", "fp16"]
    assert (rounded - exact).abs().max() <= 2**-7 * exact.abs().max()


def test_large_maps_are_written_in_slices(photos: Path, tmp_path: Path, monkeypatch) -> None:
    run(photos, tmp_path / "one")
    monkeypatch.setattr("fmupsample.pipeline.maps._CHUNK_BYTES", 4 * 32 * 48 * 4)
    run(photos, tmp_path / "many")
    for name in files(tmp_path / "one"):
        a, b = (load_file(tmp_path / way / name)["features"] for way in ("one", "many"))
        assert torch.equal(a, b)


def test_out_of_memory_while_upsampling_fails_one_picture(photos, tmp_path, monkeypatch) -> None:
    class Heavy(Blocks):
        def reassemble(self, weights, value):
            if value.shape[1] < 6 and weights.shape[-1] == 64:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().reassemble(weights, value)

    draw(photos / "wide.png", 40, 80)
    monkeypatch.setattr("fmupsample.pipeline.maps._CHUNK_BYTES", 4 * 32 * 48 * 4)
    report = run(photos, tmp_path / "out", upsampler=Heavy())
    assert len(report.done) == 4
    assert "or a smaller --output-size" in report.failed[0]["error"]
    assert not list((tmp_path / "out").rglob(".fmupsample*"))


def test_a_picture_replaced_while_it_is_read_is_done_again(photos: Path, tmp_path, monkeypatch):
    out, load = tmp_path / "out", Pipeline.load

    def slow(self, source, reader=None):
        loaded = load(self, source, reader)
        if source.path.name == "c.png":
            draw(source.path, 40, 56)
        return loaded

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "load", slow)
        assert len(run(photos, out).done) == 4
    assert [r["relative"] for r in run(photos, out).done] == ["c.png"]
    assert len(run(photos, out).skipped) == 4


class Broken(Blocks):
    """Its weights are NaN: that shows in the upsampled map only."""

    def kernels(self, x, guidance=None, size=None):
        return super().kernels(x, guidance, size) * float("nan")


@pytest.mark.parametrize("format", ["safetensors", "npy", "compact"])
def test_nan_is_never_written(photos: Path, tmp_path: Path, format: str) -> None:
    upsampler = load_upsampler(PatchMeans(), "jbu") if format == "compact" else Broken()
    if format == "compact":
        upsampler.sigma_range = float("nan")
    report = run(photos, tmp_path / "out", ExtractOptions(format=format), upsampler=upsampler)
    assert len(report.failed) == 4 and not report.done
    assert all("holds NaN or infinity" in record["error"] for record in report.failed)
    assert files(tmp_path / "out") == set()


def test_names_too_long_for_the_disk_are_failures(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "in" / "/".join(["d" * 200] * 12)
    draw(folder / "a.png")
    draw(tmp_path / "in/b.png")
    out = tmp_path / "/".join(["o" * 200] * 8)
    report = run(tmp_path / "in", out)
    assert [r["relative"] for r in report.done] == ["b.png"] and len(report.failed) == 1
    assert "cannot be written: File name too long" in report.failed[0]["error"]


def test_the_estimate_leaves_unreadable_pictures_out(photos: Path, tmp_path: Path) -> None:
    said: list[str] = []
    run(photos, tmp_path / "a", say=said.append)
    for i in range(4):
        (photos / f"bad{i}.png").write_text("no picture")
    run(photos, tmp_path / "b", say=said.append)
    need = [re.search(r"pictures, (?:about )?(\S+ \S+) in", text)[1] for text in said]
    assert need[0] == need[1]
