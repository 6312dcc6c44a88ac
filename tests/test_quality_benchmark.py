"""The quality benchmark on tiny drawn data with the toy backbone: cells, resuming, tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy import ToyBackbone

import protocols
import quality
import tables
from contenders import ABLATIONS, ablate, gather, named_file
from fmupsample.errors import UsageError
from fmupsample.upsamplers import ReSFU, ReSFUConfig, save_head
from labelled import camvid, davis

COLOURS = np.array([[200, 40, 40], [40, 200, 60], [50, 60, 210]], np.uint8)


def draw(picture: Path, label: Path, shift: int, classes: int) -> None:
    y, x = np.mgrid[:48, :64]
    found = (x > 20 + 3 * shift).astype(np.uint8)
    if classes > 2:
        found[(y - 22) ** 2 + (x - 30 - 2 * shift) ** 2 < 90] = 2
    for file in (picture, label):
        file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(shift).integers(0, 30, (48, 64, 3))
    Image.fromarray((COLOURS[found] + noise).astype(np.uint8)).save(picture)
    found[:2] = 255 if classes > 2 else found[:2]
    Image.fromarray(found).save(label)


@pytest.fixture
def data(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for i in range(count):
            folder = tmp_path / "camvid" / split
            draw(folder / "images" / f"{i}.png", folder / "labels" / f"{i}.png", i, 3)
    for sequence in ("cow", "dog"):
        for i in range(3):
            images, labels = (tmp_path / "davis" / k / sequence for k in ("images", "labels"))
            draw(images / f"0{i}.jpg", labels / f"0{i}.png", i, 2)
    return tmp_path


@pytest.fixture
def head(tmp_path):
    torch.manual_seed(5)
    module = ReSFU(ReSFUConfig(16, guidance_channels=8, embedding=8, middle=16, norm_groups=4))
    save_head(tmp_path / "head.safetensors", module, ToyBackbone())
    return tmp_path / "head.safetensors"


@pytest.fixture
def run(data, head, monkeypatch):
    """``run(*options)`` -> the report; counts what the backbone computed in ``run.backbone``."""
    backbone = ToyBackbone()
    monkeypatch.setattr(protocols, "load_backbone", lambda *_, **__: backbone)
    options = ["--camvid", str(data / "camvid"), "--davis", str(data / "davis"), "--image-size"]
    options += ["48", "--epochs", "4", "--shot-steps", "8", "--pixels", "200", "--rates", "1e-2"]
    options += ["1e-1", "--device", "cpu", "-o", str(data / "out.json")]
    options += ["--upsamplers", "nearest", "bilinear"]

    def go(*more: str) -> dict:
        quality.main([*options, *more])
        return json.loads((data / "out.json").read_text())

    go.backbone = backbone
    return go


def test_a_run_stops_goes_on_and_tells(run, data, head, capsys, monkeypatch):
    text = data / "out.md"
    mine = ["--head", f"mine={head}", "--ablate", "mine", "--seeds", "2"]
    report = run("--seeds", "1")
    assert {(c["dataset"], c["upsampler"], c["seed"]) for c in report["cells"]} == {
        (d, u, 0) for d in ("camvid", "davis") for u in ("nearest", "bilinear")
    }
    finished = report["cells"]

    # Stopped in the middle: what was finished is there, and is not measured again.
    real, calls = protocols.fit_probe, []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) > 6:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(protocols, "fit_probe", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(*mine)
    part = json.loads((data / "out.json").read_text())["cells"]
    assert all(cell in part for cell in finished) and len(part) > len(finished)
    monkeypatch.setattr(protocols, "fit_probe", real)
    report = run(*mine, "--markdown", str(text))
    assert all(cell in report["cells"] for cell in part)

    impossible = {"inner", "no-colours", "no-prior", "no-taper", "fine"}
    names = ["nearest", "bilinear", "mine"] + [
        f"mine {part}" for part in ABLATIONS if part not in impossible
    ]
    assert len(report["cells"]) == 2 * 2 * len(names)
    assert set(report["skipped"]) == {f"mine {part}" for part in impossible}
    assert "needs training" in report["skipped"]["mine inner"]
    assert {"cpu", "torch", "commit"} <= report["machine"].keys()
    assert report["settings"]["backbone_fingerprint"] == ToyBackbone().fingerprint
    assert report["settings"]["camvid_probe"]["rates"] == [1e-2, 1e-1]
    assert report["upsamplers"]["mine no-detail"]["config"]["detail"] is False
    lines = text.read_text().splitlines()
    assert lines[0].startswith("CamVid") and len([x for x in lines if x.startswith("| mine")]) == 10
    assert "±" in lines[4] and lines[4].endswith("| 2 |")
    assert "boundary" in capsys.readouterr().out

    before, calls = run.backbone.calls, []
    monkeypatch.setattr(protocols, "fit_probe", stopping)
    run(*mine)  # everything is there: nothing is computed
    assert run.backbone.calls == before and not calls


def test_numbers_are_what_they_are_called(run):
    report = run("--seeds", "2")
    cells = {(c["dataset"], c["upsampler"], c["seed"]): c for c in report["cells"]}
    nearest = cells["camvid", "nearest", 0]
    # The probe on patch features is the probe on nearest upsampling.
    assert nearest["preserved"] == nearest["fitted"]
    bilinear = cells["camvid", "bilinear", 1]
    assert bilinear["preserved"] != bilinear["fitted"]
    for probe in ("preserved", "fitted"):
        # Three of the eleven classes are drawn.
        assert sum(v not in (None, 0.0) for v in bilinear[probe]["iou"]) == 3
        assert bilinear[probe]["band_miou"] < bilinear[probe]["miou"] < 1
        davis_cell = cells["davis", "bilinear", 0][probe]
        assert davis_cell["j"] > 0.8
        assert davis_cell["j"] == pytest.approx(
            np.mean([s["j"] for s in davis_cell["sequences"].values()]), abs=1e-5
        )


def test_other_settings_and_other_files_are_refused(run, data):
    run("--seeds", "1")
    with pytest.raises(UsageError, match="image_size: 48 there, 64 here"):
        run("--seeds", "1", "--image-size", "64")
    (data / "out.json").write_text("{}")
    with pytest.raises(UsageError, match="no results of this benchmark"):
        run("--seeds", "1")


def test_kernels_are_dropped_from_the_cache_and_features_kept(run, data):
    run("--seeds", "1", "--cache", str(data / "cache"), "--upsamplers", "nearest", "jbu")
    kept = {p.name.partition("-")[0] for p in (data / "cache").iterdir()}
    assert kept == {"features"}


def test_data_that_is_not_as_expected(data):
    assert [len(v) for v in davis(data / "davis").values()] == [3, 3]
    assert [x.labels.stem for x in camvid(data / "camvid", "train", 2)] == ["0", "3"]
    (data / "camvid" / "val" / "labels" / "1.png").unlink()
    with pytest.raises(UsageError, match="have no labels"):
        camvid(data / "camvid", "val")
    with pytest.raises(UsageError, match="no sequences"):
        davis(data)


def test_contenders_are_named_and_checked(head):
    backbone = ToyBackbone()
    with pytest.raises(UsageError, match="NAME=FILE"):
        named_file("head.safetensors")
    with pytest.raises(UsageError, match="given twice"):
        gather(backbone, ["jbu"], [("jbu", head)], [])
    with pytest.raises(UsageError, match="no head of resfu or bilateral-cells"):
        gather(backbone, ["jbu"], [], ["jbu"])
    (mine,), _ = gather(backbone, [], [("mine", head)], [])
    coarse = ablate(mine.upsampler, "coarse", ABLATIONS["coarse"])
    assert coarse.fingerprint != mine.fingerprint
    with pytest.raises(UsageError, match="changes nothing"):
        ablate(coarse, "coarse", ABLATIONS["coarse"])


def test_spread_is_that_of_the_seeds():
    def cell(seed, miou):
        shares = {"miou": miou, "band_miou": 0.5, "boundary_f": None}
        return {"dataset": "camvid", "upsampler": "a", "seed": seed} | dict.fromkeys(
            tables.PROBES, shares
        )

    (row,) = tables.rows([cell(0, 0.40), cell(1, 0.42), cell(2, 0.44)], "camvid", ["a", "b"])
    assert row[:4] == ["a", "42.0 ± 2.0", "50.0 ± 0.0", "-"] and row[-1] == "3"
    (row,) = tables.rows([cell(0, 0.40)], "camvid", ["a"])
    assert row[1] == "40.0"
