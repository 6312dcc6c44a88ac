"""``--views`` as it is typed: every command, what it says, what it refuses to mix."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import Blocks, film
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from small_training import HEAD, SMALL, assert_same, draw_pictures, options, run
from toy import ToyBackbone
from typer.testing import CliRunner

import fmupsample
from fmupsample.backbones.views import with_views
from fmupsample.errors import HeadError, ProbeError, UsageError
from fmupsample.images import ImageSize, find_images
from fmupsample.jobs.extract import Extract, ExtractOptions, extract
from fmupsample.pipeline import Pipeline
from fmupsample.probing.probe import load_probe
from fmupsample.runs.manifest import Manifest
from fmupsample.training import fit, loop
from fmupsample.upsamplers import (
    Bilinear,
    JointBilateral,
    ReSFU,
    ReSFUConfig,
    load_head,
    load_upsampler,
    save_head,
)
from fmupsample.upsamplers.heads import read_head_metadata
from fmupsample.upsamplers.loading import find_head
from fmupsample.upsamplers.registry import learned_names
from fmupsample_cli.main import build_app, main


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("FMUPSAMPLE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def call(backbone_file):
    """Runs a command with a tiny random ViT, through the real loading of models."""
    weights = backbone_file("vit.safetensors")

    def run_it(*arguments: object) -> int:
        return main([*map(str, arguments), "--backbone-weights", str(weights), "--device", "cpu"])

    return run_it


@pytest.mark.parametrize(
    "command",
    [("extract",), ("visualize",), ("train",), ("probe", "fit"), ("probe", "eval"),
     ("probe", "predict")],
    ids=" ".join,
)  # fmt: skip
def test_help_and_numbers_that_cannot_be(command, tmp_path, capsys) -> None:
    result = CliRunner().invoke(build_app(), [*command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0 and "--views" in result.output
    assert main([*command, str(tmp_path), "-o", str(tmp_path / "x"), "--views", "3"]) == 2
    assert "3 is not one of 1, 2, 4, 9" in capsys.readouterr().err


def test_extract(call, pictures, tmp_path, capsys) -> None:
    def records(folder: str) -> dict[str, dict]:
        lines = (tmp_path / folder / "manifest.jsonl").read_text().splitlines()
        return {Path(r["source"]).name: r for r in map(json.loads, lines) if r["status"] == "ok"}

    size = ("--image-size", 64, "--upsampler", "bilinear")
    assert call("extract", pictures, "-o", tmp_path / "one", *size) == 0
    capsys.readouterr()
    four = ("extract", pictures, "-o", tmp_path / "four", *size, "--views", 4)
    assert call(*four) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "64 channels per 8x8 pixels" in said
    assert "4 views: 4 passes of the backbone for every picture" in said
    assert "4 passes of the backbone for each" in said
    one, found = records("one"), records("four")
    for name, record in found.items():
        assert record["grid"] == [2 * n for n in one[name]["grid"]]
        assert record["stride"] == [8, 8] and one[name]["stride"] == [16, 16]
        assert record["shape"] == one[name]["shape"]
        assert record["options"]["views"] == 4 and "views" not in one[name]["options"]
        assert record["options_hash"] != one[name]["options_hash"]
    path = tmp_path / "four/disc.safetensors"
    with safe_open(path, "pt") as file:
        assert file.metadata()["views"] == "4"
        assert json.loads(file.metadata()["stride"]) == [8, 8]
    with safe_open(tmp_path / "one/disc.safetensors", "pt") as file:
        assert "views" not in file.metadata()
    # Either number of views is refused in the folder of the other, in words.
    for folder, now, then in (("one", 4, 1), ("four", 1, 4)):
        again = ("extract", pictures, "-o", tmp_path / folder, *size, "--views", now)
        assert call(*again) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"made with other options: views {then} (now {now}); choose" in said
        assert call(*again[:-1], then) == 0
        assert "all results are there" in capsys.readouterr().err


def test_extract_tokens_pca_shards_and_estimates(call, pictures, tmp_path, capsys) -> None:
    size = ("--image-size", 64, "--views", 9)
    assert call("extract", pictures, "-o", tmp_path / "t", *size, "--tokens-only") == 0
    tokens = load_file(tmp_path / "t/disc.safetensors")["features"]
    assert tokens.shape == (64, 12, 18)  # 64 x 96 pixels are 4 x 6 patches
    said = " ".join(capsys.readouterr().err.split())
    assert "9 passes of the backbone for each" in said
    estimate = ExtractOptions(tokens_only=True)
    backbone = ToyBackbone()
    needed = [
        Extract(pipeline, estimate).bytes_of((640, 640))
        for pipeline in (
            Pipeline(with_views(backbone, n), Bilinear(), image_size=ImageSize.parse(640))
            for n in (1, 4, 9)
        )
    ]
    assert needed[1] - needed[0] == 3 * 2 * 16 * 80 * 80
    assert needed[2] - needed[0] == 8 * 2 * 16 * 80 * 80
    assert call("extract", pictures, "-o", tmp_path / "s", *size, "--pca", 4, "--shard-size", 2,
                "--format", "compact", "--upsampler", "jbu") == 0  # fmt: skip
    shards = fmupsample.open_shards(tmp_path / "s")
    assert shards["disc"].shape == (4, 64, 96)
    assert shards["disc"].values.shape == (4, 12, 18)
    assert shards["disc"].meta["views"] == "9"


@pytest.mark.parametrize("views", [2, 4, 9])
@pytest.mark.parametrize("method", [Bilinear(), JointBilateral()], ids=lambda u: u.name)
def test_a_compact_file_is_the_map(views, method, pictures, tmp_path) -> None:
    method.fingerprint = method.name
    pipeline = Pipeline(
        with_views(ToyBackbone(stride=14), views), method, image_size=ImageSize.parse("56x70")
    )
    sources = find_images([pictures / "disc.png"])
    for kind, bits in (("compact", 32), ("safetensors", 16)):
        wanted = ExtractOptions(kind, "fp32", weight_bits=bits)
        assert not extract(pipeline, sources, tmp_path / kind, wanted).failed
    whole = load_file(tmp_path / "safetensors/disc.safetensors")["features"]
    opened = fmupsample.open(tmp_path / "compact/disc.safetensors")
    assert opened.values.shape[1:] == pipeline.backbone.grid((56, 70))
    torch.testing.assert_close(opened.full(), whole, rtol=1e-4, atol=1e-5)
    assert opened.meta["views"] == str(views)
    bounded = Pipeline(pipeline.backbone, method, image_size=ImageSize.parse("56x70"), max_memory=1)
    assert not extract(bounded, sources, tmp_path / "bounded", wanted).failed
    again = load_file(tmp_path / "bounded/disc.safetensors")["features"]
    torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-5)


def test_old_manifests_mean_one_view(pictures, tmp_path) -> None:
    """Nothing that one view writes has changed: its options have no word of views."""
    pipeline = Pipeline(ToyBackbone(), Blocks())
    extract(pipeline, find_images([pictures]), tmp_path / "out")
    for record in Manifest(tmp_path / "out").records.values():
        assert "views" not in record["options"]
        assert record["options"]["backbone_fingerprint"] == ToyBackbone().fingerprint


def test_large_pictures_in_windows(call, tmp_path) -> None:
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (128, 160, 3), np.uint8)).save(tmp_path / "a.png")
    args = ("extract", tmp_path / "a.png", "--image-size", "native", "--views", 4, "--window", 64)
    assert call(*args, "-o", tmp_path / "out", "--tokens-only") == 0
    assert load_file(tmp_path / "out/a.safetensors")["features"].shape == (64, 16, 20)


def test_visualize_pictures_and_a_video(call, pictures, tmp_path, capsys) -> None:
    film(pictures / "clip.mp4", 4)
    args = ("visualize", pictures, "-o", tmp_path / "drawn", "--image-size", 64)
    assert call(*args, "--upsampler", "bilinear", "--views", 4, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["views"] == 4 and not found["failed"] and len(found["drawn"]) == 4
    # Drawings of one view are others: all of them are drawn anew.
    assert call(*args, "--upsampler", "bilinear", "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["views"] == 1 and again["skipped"] == 0 and len(again["drawn"]) == 4


def labelled(root: Path) -> Path:
    for number in range(10):
        labels = Image.new("P", (64, 48), 0)
        picture = Image.new("RGB", (64, 48), (200, 40 + number, 40))
        box = (10 + 2 * number, 8, 40 + 2 * number, 40)
        picture.paste((20, 60, 220), box)
        labels.paste(1, box)
        for folder, image in (("images", picture), ("labels", labels)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            image.save(root / folder / f"{number}.png")
    return root


def test_probe_fit_eval_predict_and_points(call, tmp_path, capsys) -> None:
    data, probe = labelled(tmp_path / "data"), tmp_path / "p.safetensors"
    fit_it = ("probe", "fit", data, "-o", probe, "--epochs", 2, "--image-size", 64,
              "--upsampler", "bilinear", "--cache", tmp_path / "kept")  # fmt: skip
    assert call(*fit_it, "--views", 4) == 0
    kept = len(list((tmp_path / "kept").iterdir()))
    assert "4 passes of the backbone" in " ".join(capsys.readouterr().err.split())
    fitted = load_probe(probe)
    assert fitted.views == 4 and fitted.backbone["views"] == 4
    assert fitted.backbone["stride"] == [16, 16]
    folders = data / "images", data / "labels"
    assert call("probe", "eval", probe, *folders, "--json") == 0
    assert json.loads(capsys.readouterr().out)["miou"] > 0.3
    assert call("probe", "predict", probe, folders[0], "-o", tmp_path / "masks") == 0
    assert "4 passes of the backbone for each" in " ".join(capsys.readouterr().err.split())
    records = Manifest(tmp_path / "masks").records.values()
    assert {r["options"]["views"] for r in records} == {4}
    for command in (
        ("eval", probe, *folders),
        ("predict", probe, folders[0], "-o", tmp_path / "m"),
    ):
        assert call("probe", *command, "--views", 1) == 1
        said = " ".join(capsys.readouterr().err.split())
        assert "this probe was fitted with --views 4, not 1" in said
        assert call("probe", *command, "--views", 4) == 0
    # Features of one view are kept beside those of four, never taken for them.
    assert call(*fit_it, "--overwrite") == 0
    assert load_probe(probe).views == 1 and "views" not in load_probe(probe).backbone
    assert len(list((tmp_path / "kept").iterdir())) == 2 * kept
    assert call("probe", "predict", probe, folders[0], "-o", tmp_path / "masks") == 2
    clicks = {"points": [
        {"image": "0.png", "x": 20, "y": 20, "class": "box"},
        {"image": "0.png", "x": 60, "y": 4, "class": "ground"},
    ]}  # fmt: skip
    (tmp_path / "clicks.json").write_text(json.dumps(clicks))
    with_points = call(
        "probe", "fit", folders[0], "-o", tmp_path / "c.safetensors", "--image-size", 64,
        "--points", tmp_path / "clicks.json", "--upsampler", "bilinear", "--views", 9,
    )  # fmt: skip
    assert with_points == 0, capsys.readouterr().err
    assert load_probe(tmp_path / "c.safetensors").views == 9


def test_a_probe_is_checked_against_the_views(tmp_path, call, capsys) -> None:
    data = labelled(tmp_path / "data")
    assert call("probe", "fit", data, "-o", tmp_path / "p.safetensors", "--epochs", 1,
                "--image-size", 64, "--upsampler", "bilinear", "--views", 2) == 0  # fmt: skip
    probe = load_probe(tmp_path / "p.safetensors")
    single = fmupsample.load_backbone(weights=tmp_path / "vit.safetensors")
    method = load_upsampler(single, "bilinear")
    probe.check(Pipeline(with_views(single, 2), method))
    with pytest.raises(ProbeError, match="with --views 2, not 4"):
        probe.check(Pipeline(with_views(single, 4), method))


# -- heads -----------------------------------------------------------------------------------------


def test_a_head_serves_its_backbone_in_any_number_of_views(tmp_path) -> None:
    torch.manual_seed(0)
    one, four = ToyBackbone(), with_views(ToyBackbone(), 4)
    head = ReSFU(ReSFUConfig(channels=16, **HEAD)).eval()
    folder = tmp_path / "cache/heads"
    folder.mkdir(parents=True)
    save_head(folder / "b.safetensors", head, four)
    assert read_head_metadata(folder / "b.safetensors")["backbone"] == {
        "name": "toy.v1", "layer": 11, "channels": 16, "stride": [8, 8], "mean": [0.5] * 3,
        "std": [0.25] * 3, "fingerprint": "0123456789ab", "views": 4,
    }  # fmt: skip
    for backbone in (one, four, with_views(one, 9)):
        image = torch.randn(1, 3, 48, 64)
        up = load_head(folder / "b.safetensors", backbone)
        assert up(backbone(image), image).shape == (1, 16, 48, 64)
        assert find_head(backbone) == folder / "b.safetensors"
    save_head(folder / "c.safetensors", head, one)
    assert find_head(one) == folder / "c.safetensors"
    assert find_head(four) == folder / "b.safetensors"
    with pytest.raises(HeadError, match="made for another backbone"):
        load_head(folder / "b.safetensors", with_views(ToyBackbone(name="other.v1"), 4))
    assert fit.fitted_head_path(one, "resfu") != fit.fitted_head_path(four, "resfu")


# -- training --------------------------------------------------------------------------------------


def test_train(call, tmp_path, capsys) -> None:
    photos = draw_pictures(tmp_path / "photos", side=96)
    given = {**SMALL, "image_sizes": [64], "side": 96, "steps": 2, "validate_every": 2}
    output = tmp_path / "h.safetensors"
    assert call("train", photos, "-o", output, "--config", json.dumps(given), "--views", 4,
                "--objective", "clusters,crops", "--json") == 0  # fmt: skip
    streams = capsys.readouterr()
    assert "4 views" in " ".join(streams.err.split())
    assert "4 passes of the backbone for every crop" in " ".join(streams.err.split())
    assert set(json.loads(streams.out)["held_out"]["terms"]) == {"clusters", "crops"}
    assert read_head_metadata(output)["backbone"]["views"] == 4


@pytest.mark.parametrize("views", [1, 9])
def test_a_run_with_views_goes_on_to_the_same_head(views, tmp_path, monkeypatch) -> None:
    """With cells of whole pixels, and of 8/3."""
    pictures = draw_pictures(tmp_path / "pictures")
    config = options(crops_kept=2)
    more = {"backbone": with_views(ToyBackbone(), views)}
    whole, output = tmp_path / "whole.safetensors", tmp_path / "head.safetensors"
    report = run(pictures, whole, config, **more)
    assert report.score is not None and report.score.terms["crops"] > 0
    step = loop.Trainer._do_step

    def fail(self, *arguments):
        if self.step == 5:
            raise RuntimeError("power")
        step(self, *arguments)

    monkeypatch.setattr(loop.Trainer, "_do_step", fail)
    with pytest.raises(RuntimeError, match="power"):
        run(pictures, output, config, **more)
    monkeypatch.setattr(loop.Trainer, "_do_step", step)
    other = with_views(ToyBackbone(), 4)
    with pytest.raises(UsageError, match="other pictures, backbone or"):
        run(pictures, output, config, backbone=other, resume=True)
    assert run(pictures, output, config, resume=True, **more).resumed_at == 4
    assert_same(output, whole)


@pytest.mark.parametrize("name", learned_names())
def test_every_upsampler_trains(name, tmp_path) -> None:
    config = options(upsampler=name, upsampler_config={}, steps=1, validate_every=1, previews=0)
    report = run(draw_pictures(tmp_path / "pictures"), tmp_path / "h.safetensors", config)
    assert report.score.terms["crops"] > 0


def test_configurations_of_earlier_versions() -> None:
    assert options(views=3).crops_kept == 3
