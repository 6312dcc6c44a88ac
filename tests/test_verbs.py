"""The commands as functions do what the commands do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import draw, film
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import fmupsample
from fmupsample.errors import ProbeError, UsageError
from fmupsample.upsamplers import ReSFU
from fmupsample_cli.main import main


def command(*arguments: object) -> None:
    assert main([*map(str, arguments), "--quiet"]) == 0


def contents(folder: Path) -> dict[str, object]:
    """All files but the manifest, which holds times."""

    def read(path: Path) -> object:
        if path.suffix != ".safetensors":
            return path.read_bytes()
        with safe_open(path, "np") as file:  # whose header has an order of its own
            tensors = {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
            return file.metadata(), tensors

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    left_out = (".jsonl", ".lock")
    return {str(f.relative_to(folder)): read(f) for f in files if f.suffix not in left_out}


@pytest.fixture
def weights(backbone_file) -> Path:
    return backbone_file()


def test_extract(pictures, weights, tmp_path) -> None:
    options = {"upsampler": "jbu", "image_size": 64, "device": "cpu"}
    report = fmupsample.extract(
        pictures, tmp_path / "a", backbone_weights=weights, dtype="fp32", pca=4, **options
    )
    assert len(report.done) == 3 and not report.failed
    command(
        "extract", pictures, "-o", tmp_path / "b", "--backbone-weights", weights, "--pca", 4,
        "--dtype", "fp32", "--upsampler", "jbu", "--image-size", 64, "--device", "cpu",
    )  # fmt: skip
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    (pictures / "bad.jpg").write_text("no")
    again = fmupsample.extract(
        [str(pictures)], tmp_path / "a", backbone_weights=weights, dtype="fp32", pca=4, **options
    )
    assert (len(again.done), len(again.skipped), len(again.failed)) == (0, 3, 1)


def test_extract_frames(weights, tmp_path) -> None:
    clip = film(tmp_path / "clip.avi", 10)
    report = fmupsample.extract(
        clip, tmp_path / "a", every=4, start="0.1", tokens_only=True,
        backbone_weights=weights, upsampler="nearest", image_size=32,
    )  # fmt: skip
    assert [record["frame_index"] for record in report.done] == [1, 5, 9]


def test_visualize(pictures, weights, tmp_path) -> None:
    report = fmupsample.visualize(
        pictures, tmp_path / "a", points=[(5, 7)], layout="overlay",
        backbone_weights=weights, upsampler="bilinear", image_size=64,
    )  # fmt: skip
    assert report.pictures == 3 and not report.failed
    command(
        "visualize", pictures, "-o", tmp_path / "b", "--point", "5,7", "--layout", "overlay",
        "--backbone-weights", weights, "--upsampler", "bilinear", "--image-size", 64,
    )  # fmt: skip
    drawn = contents(tmp_path / "a")
    assert len(drawn) == 8 and drawn == contents(tmp_path / "b")


def test_train(pictures, tiny_backbone, tmp_path) -> None:
    options = {
        "upsampler": "resfu",
        "steps": 2,
        "batch_size": 1,
        "image_sizes": 32,
        "device": "cpu",
    }
    small = {"embedding": 8, "middle": 16, "groups": 2, "norm_groups": 4}
    head = tmp_path / "head.safetensors"
    draw(pictures / "more.png", 64, 64)
    report = fmupsample.train(
        pictures, head, backbone=tiny_backbone, upsampler_config=small,
        objective="crops", **options,
    )  # fmt: skip
    assert report.output == head and report.config.steps == 2
    assert isinstance(fmupsample.load_upsampler(tiny_backbone, head), ReSFU)
    with pytest.raises(UsageError, match="did you mean steps"):
        fmupsample.train(pictures, head, backbone=tiny_backbone, stepps=2)


@pytest.fixture
def labelled(tmp_path: Path) -> tuple[Path, Path]:
    """Pictures of two flat colours, and which of them each pixel has."""
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.mkdir(), labels.mkdir()
    rng = np.random.default_rng(0)
    for n in range(3):
        classes = np.zeros((64, 64), np.uint8)
        classes[:, 16 * (n + 1) :] = 1
        colours = np.array([[40, 60, 90], [220, 200, 40]])[classes]
        pixels = colours + rng.integers(-5, 5, colours.shape)
        Image.fromarray(pixels.astype(np.uint8)).save(images / f"{n}.png")
        Image.fromarray(classes).save(labels / f"{n}.png")
    return images, labels


def test_probe(labelled, weights, tmp_path) -> None:
    models = {"backbone_weights": weights, "upsampler": "bilinear", "image_size": 64}
    path = tmp_path / "probe.safetensors"
    probe = fmupsample.probe.fit(*labelled, path, classes=["dark", "light"], epochs=2, **models)
    assert probe.classes.names == ("dark", "light")
    other = tmp_path / "other.safetensors"
    command(
        "probe", "fit", *labelled, "-o", other, "--classes", "dark,light", "--epochs", 2,
        "--backbone-weights", weights, "--upsampler", "bilinear", "--image-size", 64,
    )  # fmt: skip
    mine, theirs = load_file(path), load_file(other)
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0)

    judged = fmupsample.probe.evaluate(probe, *labelled, backbone_weights=weights)
    command(
        "probe", "eval", path, *labelled, "-o", tmp_path / "report", "--backbone-weights", weights
    )
    said = json.loads((tmp_path / "report/metrics.json").read_text())
    assert judged["miou"] == pytest.approx(said["miou"]) and judged["iou"] == said["iou"]

    report = fmupsample.probe.predict(path, labelled[0], tmp_path / "a", backbone_weights=weights)
    assert len(report.done) == 3
    command(
        "probe", "predict", path, labelled[0], "-o", tmp_path / "b", "--backbone-weights", weights
    )
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    with pytest.raises(ProbeError, match="name it as backbone_weights"):
        fmupsample.probe.predict(path, labelled[0], tmp_path / "a")
    with pytest.raises(UsageError, match="task 'depths' is unknown"):
        fmupsample.probe.fit(*labelled, task="depths")


def test_depth_probe(labelled, weights, tmp_path) -> None:
    images, labels = labelled
    for path in labels.iterdir():
        metres = np.asarray(Image.open(path)).astype(np.uint16) * 1000 + 1000
        Image.fromarray(metres).save(path)
    models = {"backbone_weights": weights, "upsampler": "bilinear", "image_size": 64}
    probe = fmupsample.probe.fit(images, labels, task="depth", depth_scale=1000, epochs=1, **models)
    assert probe.depth["high"] == pytest.approx(2, abs=0.1)
    found = fmupsample.probe.evaluate(probe, images, labels, backbone_weights=weights)
    assert set(found) >= {"rmse"}


def test_wrong_options_are_told(pictures, tmp_path, monkeypatch) -> None:
    with pytest.raises(UsageError, match="extract has no option 'fromat': did you mean format"):
        fmupsample.extract(pictures, tmp_path / "a", fromat="npy")
    with pytest.raises(UsageError, match="visualize has no option 'xyzzy': it has basis"):
        fmupsample.visualize(pictures, tmp_path / "a", xyzzy=1)
    with pytest.raises(UsageError, match="--every is for videos, and there is none here"):
        fmupsample.extract(pictures, tmp_path / "a", every=2)
    with pytest.raises(UsageError, match="does not exist"):
        fmupsample.extract(tmp_path / "no", tmp_path / "a")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="for one process: torchrun is for `-m fmupsample`"):
        fmupsample.extract(pictures, tmp_path / "a")
