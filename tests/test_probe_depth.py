"""Depth probes: files, the metrics, and scenes of known geometry from end to end."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy import ToyBackbone

import fmupsample_cli.loading
from fmupsample.errors import ImageError, UsageError
from fmupsample.labels.depth import read_depth
from fmupsample.probing.tasks import Depth, DepthErrors
from fmupsample.upsamplers import Bilinear
from fmupsample_cli.main import main

SIZE = (64, 96)  # H, W
FOCAL, EYE, FOG = 80.0, 1.5, 6.0  # pixels, metres, metres


def scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A floor, a wall behind it and a box on it, seen by a pinhole camera through fog.

    Returns the picture uint8 ``[H, W, 3]`` and the distance along the axis, metres ``[H, W]``.
    """
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    down = (rows - 0.35 * SIZE[0]) / FOCAL
    wall, box = random.uniform(6, 9), random.uniform(2.5, 4.5)
    with np.errstate(divide="ignore"):
        floor = np.where(down > 0, EYE / down, np.inf)
    depth = np.minimum(floor, wall)
    left = random.integers(10, 60)
    top, bottom = (0.35 * SIZE[0] + FOCAL * y / box for y in (0.3, EYE))
    inside = (columns > left) & (columns < left + 24) & (rows > top) & (rows < bottom)
    depth = np.where(inside, np.minimum(depth, box), depth)
    # The farther, the more of the fog's colour: what a depth probe can learn from.
    seen = np.exp(-depth / FOG)[..., None]
    own = np.array([200.0, 60.0, 40.0]) + random.normal(0, 2, (*SIZE, 3))
    colours = own * seen + np.array([90.0, 150.0, 230.0]) * (1 - seen)
    return colours.clip(0, 255).astype(np.uint8), depth.astype(np.float32)


def draw(root: Path, count: int, first: int = 0, *, npy: bool = False, scale: float = 1000) -> Path:
    for number in range(first, first + count):
        picture, depth = scene(number)
        for folder in ("images", "depth"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(root / f"images/{number}.png")
        depth[:2] = np.nan if npy else 0  # nothing is known there
        if npy:
            np.save(root / f"depth/{number}.npy", depth)
        else:
            Image.fromarray(np.rint(depth * scale).astype(np.uint16)).save(
                root / f"depth/{number}.png"
            )
    return root


def bilinear() -> Bilinear:
    upsampler = Bilinear()
    upsampler.fingerprint = "bilinear"
    return upsampler


@pytest.fixture(autouse=True)
def toy(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(
        fmupsample_cli.loading, "load_models", lambda *_, **__: (ToyBackbone(), bilinear())
    )
    monkeypatch.setenv("FMUPSAMPLE_CACHE", str(tmp_path / "cache"))


def call(command: str, *arguments: object) -> int:
    return main(["probe", command, *map(str, arguments), "--device", "cpu", "--quiet"])


def fit(root: Path, output: Path, *more: object) -> int:
    options = ("--task", "depth", "--image-size", 64, "--epochs", 20, "--lr", 0.3)
    return call("fit", root, "-o", output, *options, *more)


@pytest.mark.parametrize("npy, scale", [(False, 1000), (False, 256), (True, 1000)])
def test_distances_of_known_geometry(tmp_path, npy, scale, capsys):
    root = draw(tmp_path / "train", 12, npy=npy, scale=scale)
    val = draw(tmp_path / "val", 4, first=100, npy=npy, scale=scale)
    probe = tmp_path / "p.safetensors"
    assert fit(root, probe, "--depth-scale", scale) == 0
    capsys.readouterr()
    assert call("eval", probe, val, "--json", "-o", tmp_path / "report") == 0
    found = json.loads(capsys.readouterr().out)
    mean = float(np.median([np.median(scene(n)[1]) for n in range(12)]))
    blind = DepthErrors(Depth(0.001, 9.0))
    for number in range(100, 104):
        true = torch.from_numpy(scene(number)[1])
        blind.add(torch.full_like(true, mean), true)
    assert blind.summary()["abs_rel"] > 0.3 and blind.summary()["delta1"] < 0.7
    assert found["delta1"] > 0.9 and found["abs_rel"] < 0.12 and found["rmse"] < 0.9, found
    assert found["delta1"] <= found["delta2"] <= found["delta3"] <= 1
    assert json.loads((tmp_path / "report/metrics.json").read_text())["rmse"] == found["rmse"]

    out = tmp_path / "maps"
    assert call("predict", probe, val / "images", "-o", out, "--overlay", "--npy") == 0
    with Image.open(out / "100.png") as picture:
        assert picture.mode.startswith("I") and picture.size == (96, 64)
        units = np.asarray(picture).astype(float)
    metres = np.load(out / "metres/100.npy")
    assert metres.dtype == np.float32
    np.testing.assert_allclose(units / scale, metres, atol=0.51 / scale)
    true = scene(100)[1]
    assert np.median(np.abs(metres - true) / true) < 0.15
    colours = np.asarray(Image.open(out / "colours/100.jpg")).astype(float).sum(2)
    assert colours.shape == (64, 96)  # near is bright, and all of the range is used
    assert colours[metres < np.quantile(metres, 0.1)].mean() > 350
    assert colours[metres > np.quantile(metres, 0.9)].mean() < 200
    row = next(iter(csv.DictReader((out / "areas.csv").open())))
    assert float(row["min"]) < float(row["median"]) < float(row["max"])


def test_what_is_known_is_what_is_learnt(tmp_path):
    """Depths are the bins' mean; the loss has its minimum at the truth, unknown pixels aside."""
    task = Depth(0.5, 8.0, 256)
    logits = torch.zeros(256, 1)
    logits[100] = 1e6
    torch.testing.assert_close(task.depth(logits)[0], task.centres[100], atol=1e-3, rtol=0)
    uniform = task.depth(torch.zeros(256, 1))
    torch.testing.assert_close(uniform[0], task.centres.mean())

    def loss(bins: list[int], target: list[float]) -> float:
        each = torch.zeros(len(bins), 1, 256)
        each[torch.arange(len(bins)), 0, bins] = 1e6
        target = torch.tensor(target)
        return task.loss(each, target, torch.ones(len(bins)), 1).item()

    right = [task.centres[b].item() for b in (20, 90, 200)]
    assert loss([20, 90, 200], right) < 2e-3
    assert loss([20, 90, 200, 5], [*right, 0.0]) < 2e-3  # 0: nothing is known there
    g = np.log(task.centres[[30, 90]].numpy()) - np.log(right[:2])
    expected = np.sqrt(g.var() + 0.15 * g.mean() ** 2)
    assert loss([30, 90], right[:2]) == pytest.approx(expected, abs=2e-3)


def test_metrics_are_those_of_their_definitions():
    errors = DepthErrors(Depth(0.1, 10))
    errors.add(torch.tensor([[1.0, 2.6, 3.0, 9.0]]), torch.tensor([[1.0, 2.0, 6.0, 0.0]]))
    found = errors.summary()
    assert found["delta1"] == pytest.approx(1 / 3) and found["delta2"] == pytest.approx(2 / 3)
    assert found["delta3"] == pytest.approx(2 / 3)
    assert found["abs_rel"] == pytest.approx((0 + 0.3 + 0.5) / 3)
    assert found["rmse"] == pytest.approx(((0.36 + 9) / 3) ** 0.5)
    errors.add(torch.ones(1, 4), torch.zeros(1, 4))  # nothing known: not a picture
    assert errors.summary() == found


def test_bad_depths_are_named(tmp_path, capsys):
    root = draw(tmp_path / "train", 3)
    probe = tmp_path / "p.safetensors"
    assert fit(root, probe, "--max-depth", 100) == 2
    assert "do not fit into 16 bits" in capsys.readouterr().err
    assert fit(root, probe, "--min-depth", 9, "--max-depth", 3) == 2
    assert "give 0 < --min-depth < --max-depth" in capsys.readouterr().err
    assert fit(root, probe, "--depth-scale", 1, "--max-depth", 50) == 2
    assert "is --depth-scale right?" in capsys.readouterr().err
    assert fit(root, probe, "--classes", "a,b") == 2
    assert "are for --task segmentation" in capsys.readouterr().err
    Image.new("RGB", (96, 64), "red").save(root / "depth/1.png")
    assert fit(root, probe) == 1
    assert "depth/1.png are coloured" in capsys.readouterr().err
    (root / "depth/1.png").unlink()
    for array, said in (
        (np.zeros((64, 95), np.float32), "95x64 pixels, their picture has 96x64"),
        (np.zeros((64, 96, 3)), r"expected \[H, W\]"),
        (np.array(["a"]), r"expected \[H, W\]"),
    ):
        np.save(root / "depth/1.npy", array)
        with pytest.raises(ImageError, match=said):
            read_depth(root / "depth/1.npy", size=SIZE)
    (root / "depth/1.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ImageError, match="cannot be read"):
        read_depth(root / "depth/1.npy")
    np.save(root / "depth/1.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ImageError, match="cannot be read"):  # pickles are not opened
        read_depth(root / "depth/1.npy")
    with pytest.raises(UsageError):
        Depth(0, 1)
