"""The comparison of heads trained alike, on tiny drawn data with the toy backbone."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from test_bench import labelled
from toy import ToyBackbone

import equal_steps
from fmupsample.errors import UsageError


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.setattr(equal_steps, "load_backbone", lambda name: ToyBackbone())
    for split in ("train", "val"):
        labelled(tmp_path / "camvid" / split, 4)
    photos = tmp_path / "camvid" / "train" / "images"
    folders = ["--photos", photos, "--camvid", tmp_path / "camvid", "-o", tmp_path / "out"]
    few = ["--steps", 2, "--image-size", 64, "--probe-size", 64, "--picture-size", 64]
    options = [*folders, *few, "--methods", "sapa-b", "dysample", "--device", "cpu"]

    def run(*more: object) -> dict:
        equal_steps.main([str(part) for part in (*options, *more)])
        return json.loads((tmp_path / "out" / "equal_steps.json").read_text())

    return run


def test_heads_are_trained_judged_and_drawn_once(call, tmp_path, capsys, monkeypatch):
    report = call()
    assert [cell["upsampler"] for cell in report["cells"]] == [
        "nearest", "bilinear", "jbu", "sapa-b", "dysample",
    ]  # fmt: skip
    for cell in report["cells"]:
        assert 0 <= cell["fitted"]["miou"] <= 1 and 0 <= cell["preserved"]["band_miou"] <= 1
    assert report["upsamplers"]["sapa-b"]["config"]["similarity"] == "bilinear"
    assert report["settings"]["steps"] == 2 and not report["skipped"]
    assert "| dysample |" in (tmp_path / "out" / "equal_steps.md").read_text()
    with Image.open(tmp_path / "out" / "equal_steps.jpg") as picture:
        assert picture.width > 4 * 64
    assert "dysample" in capsys.readouterr().out

    # A second run finds all of it; what is missing is made again.
    monkeypatch.setattr(equal_steps, "comparison", None)
    assert call()["cells"] == report["cells"]
    with pytest.raises(UsageError, match="steps: 2 there, 3 here"):
        call("--steps", 3)
