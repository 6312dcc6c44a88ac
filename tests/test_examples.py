"""The examples run as they stand, on the photographs that are shipped."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fmupsample
from fmupsample.backbones.embedded import embedded_path
from fmupsample.errors import BackboneError

EXAMPLES = Path(__file__).parents[1] / "examples"
PHOTOS = EXAMPLES / "images"


def run(name: str, *arguments: str) -> None:
    """The script's ``main``, in a namespace of its own."""
    runpy.run_path(str(EXAMPLES / name))["main"]([*arguments])


def test_own_backbone(tmp_path, capsys):
    out = tmp_path / "own.png"
    run("own_backbone.py", str(PHOTOS / "coffee.jpg"), "--size", "96", "--output", str(out))
    assert "Joint bilateral: [1, 24, 6, 9] -> [1, 24, 96, 144]" in capsys.readouterr().out
    picture = np.asarray(Image.open(out))
    assert picture.shape[0] > 2 * 96 and picture.std() > 20


@pytest.mark.parametrize("upsampler", ["jbu", "bilinear"])
def test_quickstart(tmp_path, capsys, monkeypatch, tiny_backbone, upsampler):
    monkeypatch.setattr(tiny_backbone, "default_image_size", 64)
    monkeypatch.setattr(fmupsample, "load_backbone", lambda _: tiny_backbone, raising=False)
    out = tmp_path / "cat.png"
    options = ["--upsampler", upsampler, "--output", str(out)]
    run("quickstart.py", str(PHOTOS / "cat.jpg"), *options)
    said = capsys.readouterr().out
    assert "64 channels on a 4 x 6 grid" in said and f"64 x 96 pixels by {upsampler}" in said
    assert Image.open(out).size == (96, 64)


def test_quickstart_with_the_shipped_model(tmp_path, capsys):
    try:
        embedded_path()
    except BackboneError as error:
        pytest.skip(f"the embedded weights are not there: {error}")
    out = tmp_path / "cat.png"
    run("quickstart.py", str(PHOTOS / "cat.jpg"), "--output", str(out))
    assert "affinity" in capsys.readouterr().out
    assert min(Image.open(out).size) >= 224


def test_quickstart_says_why_a_picture_cannot_be_used(tmp_path, monkeypatch, tiny_backbone):
    monkeypatch.setattr(fmupsample, "load_backbone", lambda _: tiny_backbone, raising=False)
    (tmp_path / "bad.jpg").write_text("no")
    with pytest.raises(SystemExit, match=r"bad\.jpg is not a picture"):
        run("quickstart.py", str(tmp_path / "bad.jpg"), "--upsampler", "jbu")


def test_photographs_are_credited_and_small():
    photos = sorted(PHOTOS.glob("*.jpg"))
    credits = (PHOTOS / "CREDITS.md").read_text()
    assert 4 <= len(photos) <= 6
    assert sum(photo.stat().st_size for photo in photos) < 1_500_000
    for photo in photos:
        assert f"`{photo.name}`" in credits
        assert min(Image.open(photo).size) >= 300
