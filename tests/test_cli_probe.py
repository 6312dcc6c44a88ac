"""``fmupsample probe fit|eval|predict`` from the command line to the files, with a toy model."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from sharing import in_threads
from toy import ToyBackbone, ToyUpsampler
from typer.testing import CliRunner

import fmupsample_cli.loading
from fmupsample.images import ImageSize, find_images
from fmupsample.jobs.predict import PredictOptions, predict_folder
from fmupsample.pipeline import Pipeline
from fmupsample.probing.probe import load_probe
from fmupsample_cli.main import build_app, main

COLOURS = ((30, 90, 200), (220, 60, 40), (240, 220, 60))


@pytest.fixture(autouse=True)
def toy(monkeypatch, tmp_path) -> ToyBackbone:
    """Every run loads this backbone, and the cache is this test's own."""
    model = ToyBackbone()
    monkeypatch.setattr(
        fmupsample_cli.loading, "load_models", lambda *_, **__: (model, ToyUpsampler())
    )
    monkeypatch.setenv("FMUPSAMPLE_CACHE", str(tmp_path / "cache"))
    return model


def draw(root: Path, count: int = 6, first: int = 0) -> Path:
    """``images/`` and ``labels/``: a disc (1) and a bar (2) on a ground (0), a row of 255."""
    random = np.random.default_rng(first)
    for number in range(first, first + count):
        name = f"sub/{number}" if number % 2 else str(number)
        picture = Image.new("RGB", (72, 56 + 8 * (number % 2)), COLOURS[0])
        labels = Image.new("P", picture.size, 0)
        labels.putpalette([0, 0, 0, 250, 0, 0, 0, 250, 0] + [0] * 759)
        x, y = (int(v) for v in random.integers(4, 26, 2))
        for image, disc, bar in ((picture, *COLOURS[1:]), (labels, 1, 2)):
            pen = ImageDraw.Draw(image)
            pen.ellipse((x, y, x + 22, y + 22), fill=disc)
            pen.rectangle((54, 4, 66, 48), fill=bar)
        ImageDraw.Draw(labels).line((0, 0, 71, 0), fill=255)
        for folder, image, suffix in (("images", picture, "jpg"), ("labels", labels, "png")):
            path = root / folder / f"{name}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, **({"quality": 95} if suffix == "jpg" else {}))
    return root


def call(command: str, *arguments: object) -> int:
    return main(["probe", command, *map(str, arguments), "--device", "cpu"])


def fit(root: Path, output: Path, *more: object) -> int:
    few = ("--epochs", 12, "--image-size", 64, "--workers", 1)
    return call("fit", root, "-o", output, *few, *more)


@pytest.fixture
def fitted(tmp_path) -> Path:
    output = tmp_path / "p.safetensors"
    assert fit(draw(tmp_path / "train"), output, "--classes", "ground,disc,bar", "--quiet") == 0
    return output


def test_help_speaks_of_every_option():
    for command, options in (
        ("fit", "--output --layout --split --classes --ignore --allow-missing --points --val-images"
         " --val-labels --val-split --epochs --lr --pixels --flips --seed --backbone --layer"
         " --backbone-weights --upsampler --head --image-size --device --precision --workers"
         " --cache --cache-limit --memory --overwrite --json --quiet"),
        ("eval", "--output --layout --split --ignore --tolerance --backbone --head --json"),
        ("predict", "--output --list --overlay --npy --backbone --head --overwrite --json"),
    ):  # fmt: skip
        result = CliRunner().invoke(
            build_app(), ["probe", command, "--help"], env={"COLUMNS": "200"}
        )
        assert result.exit_code == 0
        for option in options.split():
            assert option in result.output, (command, option)


def test_fit_shows_what_it_found_and_saves_its_configuration(tmp_path, capsys):
    output = tmp_path / "p.safetensors"
    root = draw(tmp_path / "train")
    assert fit(root, output, "--classes", "ground,disc,bar", "--seed", 3, "--json") == 0
    streams = capsys.readouterr()
    for said in ("6 pairs (layout folders)", "72x56 (3), 72x64 (3)", "bar", "ignored"):
        assert said in streams.err, streams.err
    summary = json.loads(streams.out)
    assert summary["classes"] == ["ground", "disc", "bar"] and summary["pictures"] == 6
    assert summary["options"]["seed"] == 3 and summary["options"]["epochs"] == 12
    probe = load_probe(output)
    assert probe.backbone["fingerprint"] == "0123456789ab" and probe.pictures["image_size"] == "64"
    assert probe.classes.colours[1] == (250, 0, 0)  # of the labels' own palette
    beside = json.loads(output.with_suffix(".json").read_text())
    assert beside["pictures"] == 6 and beside["image_size"] == "64"
    assert beside["options"] == summary["options"] and beside["upsampler"]["name"] == "toy"
    again = tmp_path / "again.safetensors"
    assert fit(root, again, "--classes", "ground,disc,bar", "--seed", 3, "--quiet") == 0
    assert torch.equal(load_probe(again).linear.weight, probe.linear.weight)


def test_rates_are_chosen_by_validation_pictures(tmp_path, capsys):
    root, val = draw(tmp_path / "train"), draw(tmp_path / "val", 2, first=20)
    output = tmp_path / "p.safetensors"
    more = ("--lr", "1e-6", "--lr", "0.05", "--json", "--no-flips", "--pixels", 0)
    assert (
        fit(root, output, "--val-images", val / "images", "--val-labels", val / "labels", *more)
        == 0
    )
    summary = json.loads(capsys.readouterr().out)
    assert summary["validation_pictures"] == 2 and summary["rate"] == 0.05
    assert summary["scores"]["0.05"] > summary["scores"]["1e-06"]
    split = draw(tmp_path / "data/train") and tmp_path / "data"
    draw(split / "val", 2, first=30)
    assert (
        fit(split, tmp_path / "q.safetensors", "--split", "train", "--val-split", "val", *more) == 0
    )


def test_upsamplers_are_compared_and_the_best_is_kept(tmp_path, toy, capsys):
    root = draw(tmp_path / "train")
    more = ("--lr", 0.05, "--upsampler", "toy,nearest", "--json")
    assert fit(root, tmp_path / "p.safetensors", *more, "--cache", tmp_path / "kept") == 0
    assert toy.calls == 12  # of six pictures and their mirror images, for both
    summary = json.loads(capsys.readouterr().out)
    scores = {name: rates["0.05"] for name, rates in summary["compared"].items()}
    assert list(scores) == ["toy", "nearest"] and scores["toy"] != scores["nearest"]
    best = max(scores, key=scores.get)
    probe = load_probe(tmp_path / "p.safetensors")
    assert summary["upsampler"]["name"] == probe.upsampler["name"] == best
    assert summary["scores"]["0.05"] == scores[best]
    alone = tmp_path / "q.safetensors"
    assert fit(root, alone, "--lr", 0.05, "--upsampler", best, "--quiet") == 0
    if best == "toy":  # what else would be loaded here is a toy as well
        assert torch.equal(load_probe(alone).linear.weight, probe.linear.weight)
    for text, said in (
        ("toy,toy", "different names"),
        ("toy,", "different names"),
        ("toy,foo", "'foo' is neither"),
    ):
        assert fit(root, tmp_path / "r.safetensors", "--upsampler", text) == 2
        assert said in capsys.readouterr().err
    points = ("--points", tmp_path / "x.json", "--upsampler", "toy,nearest")
    assert call("fit", root / "images", "-o", tmp_path / "r.safetensors", *points) == 2
    assert "not with --head or --points" in capsys.readouterr().err


def test_the_configuration_replaces_nothing(tmp_path, capsys):
    root, points = draw(tmp_path / "train"), tmp_path / "p.json"
    points.write_text("[]")
    assert fit(root, tmp_path / "p.safetensors") == 2
    assert "p.json exists" in capsys.readouterr().err
    clicks = ("--points", points, "--overwrite", "-o", tmp_path / "p.safetensors")
    assert call("fit", root / "images", *clicks) == 2
    assert "would be written over" in capsys.readouterr().err
    assert points.read_text() == "[]"
    (tmp_path / "file").write_text("")
    assert fit(root, tmp_path / "file/p.safetensors") == 1
    assert "is in the way" in capsys.readouterr().err


def test_the_cache_is_used_again_and_bounded(tmp_path, toy, capsys):
    root, cache = draw(tmp_path / "train"), tmp_path / "kept"
    assert fit(root, tmp_path / "a.safetensors", "--cache", cache, "--quiet") == 0
    calls = toy.calls
    assert calls == 12  # every picture, and mirrored
    assert fit(root, tmp_path / "b.safetensors", "--cache", cache, "--quiet", "--seed", 1) == 0
    assert toy.calls == calls
    more = ("--memory", 0, "--cache", tmp_path / "other", "--cache-limit", 0.001)
    assert fit(root, tmp_path / "c.safetensors", *more) == 2
    assert "raise --cache-limit" in capsys.readouterr().err
    # Without room in memory, the folder of fmupsample takes them.
    assert fit(root, tmp_path / "d.safetensors", "--memory", 0, "--quiet") == 0
    assert list((tmp_path / "cache/probing").glob("features-*"))


def test_eval_counts_what_predict_writes(tmp_path, fitted, capsys):
    val = draw(tmp_path / "val", 4, first=40)
    assert call("eval", fitted, val, "-o", tmp_path / "report", "--json", "--quiet") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["miou"] > 0.8 and summary["pixel_accuracy"] > 0.9
    assert set(summary["iou"]) == {"ground", "disc", "bar"} and 0 < summary["boundary_f"] <= 1
    assert summary["boundary_tolerance"] == 0.0075
    assert json.loads((tmp_path / "report/metrics.json").read_text())["miou"] == summary["miou"]
    assert Image.open(tmp_path / "report/confusion.png").size > (100, 100)

    assert call("predict", fitted, val / "images", "-o", tmp_path / "masks", "--quiet") == 0
    confusion = np.zeros((3, 3), int)
    for label in sorted((val / "labels").rglob("*.png")):
        true = np.asarray(Image.open(label))
        found = np.asarray(Image.open(tmp_path / "masks" / label.relative_to(val / "labels")))
        keep = true != 255
        np.add.at(confusion, (true[keep], found[keep]), 1)
    assert confusion.tolist() == summary["confusion"]
    assert call("eval", fitted, val, "--tolerance", 3) == 0
    out = capsys.readouterr().out
    assert "disc" in out and "mIoU" in out and "tolerance 3 px" in out


def test_predict_writes_masks_with_everything_beside_them(tmp_path, fitted, capsys, toy):
    photos, out = draw(tmp_path / "new", 3, first=50) / "images", tmp_path / "masks"
    arguments = (fitted, photos, "-o", out, "--overlay", "--npy")
    assert call("predict", *arguments, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["done"] == 3 and sum(summary["areas"].values()) == pytest.approx(1, abs=1e-4)
    with Image.open(out / "sub/51.png") as mask:
        assert mask.mode == "P" and mask.size == (72, 64)
        assert mask.getpalette()[3:6] == [250, 0, 0]
        shares = [(np.asarray(mask) == n).mean() for n in range(3)]
    rows = {row["picture"]: row for row in csv.DictReader((out / "areas.csv").open())}
    assert float(rows["sub/51.jpg"]["disc"]) == pytest.approx(shares[1], abs=1e-5)
    records = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert {r["relative"]: r["areas"]["bar"] for r in records}["sub/51.jpg"] == pytest.approx(
        shares[2], abs=1e-5
    )
    assert Image.open(out / "overlays/sub/51.jpg").size == (72, 64)
    numbers = np.load(out / "probabilities/sub/51.npy")
    assert numbers.dtype == np.float16 and numbers.shape == (3, 64, 72)
    assert np.abs(numbers.astype(float).sum(0) - 1).max() < 4e-3
    listed = json.loads((out / "classes.json").read_text())
    assert listed[1] == {"value": 1, "name": "disc", "colour": [250, 0, 0]}
    assert (out / "legend.png").exists()

    calls = toy.calls
    assert call("predict", *arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == 3 and toy.calls == calls
    (out / "overlays/50.jpg").unlink()  # what is missing is made again
    draw(tmp_path / "new", 1, first=54)
    assert call("predict", *arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out)["done"] == 2
    assert call("predict", fitted, photos, "-o", out) == 2  # without the overlay: other options
    assert "made with other options" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["areas.csv", "classes.json", "legend.png"])
def test_files_of_others_are_not_replaced_by_predict(tmp_path, fitted, capsys, name):
    photos, out = draw(tmp_path / "new", 1, first=50) / "images", tmp_path / "masks"
    out.mkdir()
    (out / name).write_text("mine")
    assert call("predict", fitted, photos, "-o", out) == 2
    assert f"{name}' exists and was not written by this command" in capsys.readouterr().err
    assert (out / name).read_text() == "mine"
    assert call("predict", fitted, photos, "-o", out, "--overwrite") == 0


def test_files_of_others_are_not_replaced_by_eval(tmp_path, fitted, capsys):
    val, report = draw(tmp_path / "new", 2, first=50), tmp_path / "report"
    report.mkdir()
    (report / "metrics.json").write_text('{"theirs": 1}')
    assert call("eval", fitted, val, "-o", report) == 2
    assert "metrics.json' exists and was not written by" in capsys.readouterr().err
    (report / "metrics.json").unlink()
    for _ in range(2):  # our own are
        assert call("eval", fitted, val, "-o", report) == 0


def test_masks_of_pictures_that_are_away_stay(tmp_path, fitted):
    photos, out = draw(tmp_path / "new", 3, first=50) / "images", tmp_path / "masks"
    links = tmp_path / "links"
    links.mkdir()
    for path in photos.rglob("*.jpg"):
        (links / path.name).symlink_to(path)
    arguments = (fitted, links, "-o", out, "--overlay", "--quiet")
    assert call("predict", *arguments) == 0
    before = {p: p.read_bytes() for p in out.rglob("*.*")}
    assert len(before) == 10  # legend, classes, areas and the manifest too
    photos.rename(tmp_path / "away")
    assert call("predict", *arguments) == 1  # none of them
    assert {p: p.read_bytes() for p in before} == before
    (tmp_path / "away").rename(photos)
    assert call("predict", *arguments) == 0


def test_nan_is_never_predicted(tmp_path, fitted, capsys, monkeypatch):
    photos, out = draw(tmp_path / "new", 2, first=50) / "images", tmp_path / "masks"
    kernels = ToyUpsampler.kernels
    monkeypatch.setattr(ToyUpsampler, "kernels", lambda *a, **k: kernels(*a, **k) * float("nan"))
    assert call("predict", fitted, photos, "-o", out) == 1
    assert capsys.readouterr().err.count("what is predicted holds NaN or infinity") == 2
    assert not list(out.glob("**/5*.png"))


def test_processes_that_share_the_pictures_write_what_one_does(tmp_path, fitted):
    photos = draw(tmp_path / "new", 5, first=50) / "images"
    assert call("predict", fitted, photos, "-o", tmp_path / "one", "--overlay", "--quiet") == 0

    def work(team):
        probe, sources = load_probe(fitted), find_images([photos]) if team.leads else []
        size = ImageSize.parse("64")
        pipeline = Pipeline(ToyBackbone(), ToyUpsampler(), image_size=size, workers=0)
        options = PredictOptions(overlay=True)
        return predict_folder(probe, pipeline, sources, tmp_path / "two", options, workers=team)

    first, second = in_threads(2, work)
    assert (len(first.done), len(second.done)) == (5, 2)
    names = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert names == sorted(p.relative_to(tmp_path / "two") for p in (tmp_path / "two").rglob("*.*"))
    for name in names:
        if name.name != "manifest.jsonl":
            assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_the_mask_is_what_the_features_upsampled_whole_would_give(tmp_path, fitted):
    photos = draw(tmp_path / "new", 1, first=60) / "images"
    assert call("predict", fitted, photos, "-o", tmp_path / "masks", "--quiet") == 0
    probe = load_probe(fitted)
    pipeline = Pipeline(ToyBackbone(), ToyUpsampler(), image_size=ImageSize.parse("64"), workers=0)
    (item,) = pipeline.items(find_images([photos]), on_error=None)
    dense = pipeline.upsample(item)  # [C, H, W]
    logits = torch.einsum("kc,chw->khw", probe.linear.weight, dense)
    logits = logits + probe.linear.bias[:, None, None]
    expected = torch.nn.functional.interpolate(logits[None], item.frame.original, mode="bilinear")
    mask = np.asarray(Image.open(tmp_path / "masks/60.png"))
    close = expected[0].topk(2, dim=0).values.diff(dim=0)[0].abs() < 1e-4
    assert ((mask == expected[0].argmax(0).numpy()) | close.numpy()).all()


def test_broken_pictures_do_not_stop_the_others(tmp_path, fitted, capsys):
    photos = draw(tmp_path / "new", 2, first=70) / "images"
    (photos / "bad.jpg").write_bytes(b"no picture")
    assert call("predict", fitted, photos, "-o", tmp_path / "masks", "--json") == 3
    summary = json.loads(capsys.readouterr().out)
    assert summary["done"] == 2 and "bad.jpg" in summary["failures"][0]["error"]


def test_nothing_is_overwritten(tmp_path, fitted, capsys):
    photos, out = draw(tmp_path / "new", 1, first=80) / "images", tmp_path / "masks"
    out.mkdir()
    (out / "80.png").write_bytes(b"mine")
    assert call("predict", fitted, photos, "-o", out) == 2
    assert "is not a result recorded" in capsys.readouterr().err
    (out / "80.png").unlink()
    (out / "overlays").mkdir()
    (out / "overlays/80.jpg").write_bytes(b"mine")
    assert call("predict", fitted, photos, "-o", out, "--overlay") == 2
    assert "overlays/80.jpg exists" in capsys.readouterr().err
    Image.open(photos / "80.jpg").save(photos / "81.png")
    assert call("predict", fitted, photos / "81.png", "-o", photos, "--overwrite") == 2
    assert "81.png lies in the output folder" in capsys.readouterr().err
    assert fit(tmp_path / "train", fitted) == 2
    assert "exists: give another name, or --overwrite" in capsys.readouterr().err


def test_an_interrupted_fit_leaves_nothing(tmp_path, monkeypatch, capsys):
    from fmupsample.probing import batches

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(batches.Batches, "loss", stop)
    assert fit(draw(tmp_path / "train"), tmp_path / "out/p.safetensors") == 130
    assert "stopped before the probe was complete" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_clicks_are_enough_for_a_mask(tmp_path, capsys):
    root = draw(tmp_path / "train", 3)
    clicks = [
        {"image": "0.jpg", "x": 60, "y": 30, "class": "bar"},
        {"image": "0.jpg", "x": 3, "y": 52, "class": "rest"},
        {"image": "1.jpg", "x": 60, "y": 20, "class": "bar"},
        {"image": "sub/1.jpg", "x": 4, "y": 4, "class": "rest"},
        {"image": "sub/1.jpg", "x": 40, "y": 60, "class": "rest"},
    ]
    points = tmp_path / "clicks.json"
    points.write_text(json.dumps({"classes": ["rest", "bar"], "points": clicks}))
    output = tmp_path / "p.safetensors"
    more = ("--image-size", 64, "--quiet")
    assert call("fit", root / "images", "--points", points, "-o", output, *more) == 0
    out = tmp_path / "masks"
    assert call("predict", output, root / "images/2.jpg", "-o", out, "--quiet") == 0
    mask = np.asarray(Image.open(out / "2.png"))
    assert mask[10:44, 58:63].mean() > 0.95 and mask[50:, :50].mean() < 0.05

    other = tmp_path / "q.safetensors"

    def refused(data: object, said: str) -> None:
        points.write_text(data if isinstance(data, str) else json.dumps(data))
        assert call("fit", root / "images", "--points", points, "-o", other) == 2
        assert said in capsys.readouterr().err

    for change, said in (
        ({"image": "9.jpg"}, "9.jpg is none of the 3 pictures"),
        ({"x": 73}, "lies outside of"),
        ({"class": "car"}, "class 'car' is none of rest, bar"),
        ({"x": "left"}, "point 1 is not"),
        ({"x": float("nan")}, "lies outside of"),
    ):
        refused({"classes": ["rest", "bar"], "points": [{**clicks[0], **change}]}, said)
    refused("{", "cannot be read")
    refused([], "holds no points")
    refused({"classes": 5, "points": clicks}, "must be a list of names")
    refused(clicks[:1], "one class only")


def test_what_is_wrong_is_said_before_a_model_is_loaded(tmp_path, monkeypatch, capsys):
    root = draw(tmp_path / "train", 3)

    def never(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr(fmupsample_cli.loading, "load_models", never)
    output = tmp_path / "p.safetensors"
    Image.new("L", (72, 56), 9).save(root / "labels/2.png")
    cases = [
        ((root, "--classes", "a,b,c"), r"labels/2.png hold 9, which is none of the 3 classes"),
        ((root, "--layout", "voc"), "has no JPEGImages/ and SegmentationClass/ below it"),
        ((root / "images", tmp_path / "none"), "does not exist"),
        ((root, "--split", "test"), "no split 'test'"),
        ((root, "--val-split", "val"), "needs --split train"),
        ((root, "--points", tmp_path / "x.json", "--classes", "a,b"), "--points names pictures"),
        ((root, "--depth-scale", 256), "are for --task depth"),
        ((root, "--classes", "a,b,a"), "two classes are called a"),
    ]
    for arguments, said in cases:
        assert call("fit", *arguments, "-o", output) in (1, 2)
        assert said in capsys.readouterr().err
    assert call("fit", root, "-o", tmp_path / "p.pt") == 2
    assert "a probe is a .safetensors file" in capsys.readouterr().err
    Image.new("L", (70, 56), 1).save(root / "labels/2.png")
    assert call("fit", root, "-o", output) == 1
    assert "labels/2.png have 70x56 pixels" in capsys.readouterr().err
    (root / "labels/2.png").unlink()
    assert call("fit", root, "-o", output) == 2
    assert "images/2.jpg; --allow-missing" in capsys.readouterr().err
    assert call("predict", tmp_path / "p.safetensors", root / "images", "-o", tmp_path / "m") == 1
    assert "there is no probe file" in capsys.readouterr().err


def test_another_backbone_is_refused(tmp_path, fitted, toy, capsys):
    toy.fingerprint, toy.name = "f" * 12, "other.v1"
    assert call("predict", fitted, tmp_path / "train/images", "-o", tmp_path / "m") == 1
    assert "fitted on backbone toy.v1" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
