"""``fmupsample.features``: one line from an image to the features of its pixels."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import NotLinear, PatchMeans, draw, gradient
from PIL import Image

import fmupsample
from fmupsample.errors import FmupsampleError, ImageError, UsageError
from fmupsample.upsamplers import JointBilateral

METHODS = [JointBilateral, NotLinear]


def features(images, upsampler=JointBilateral, **options):
    options = {"image_size": 64, "device": "cpu", **options}
    return fmupsample.features(images, backbone=PatchMeans(), upsampler=upsampler(), **options)


@pytest.mark.parametrize("method", METHODS)
def test_the_map_and_what_it_was_made_from(tmp_path: Path, method) -> None:
    path = draw(tmp_path / "a.png", 60, 90)
    f = features(path, method)
    assert f.shape == f.array.shape == (6, 64, 96) and f.array.dtype == np.float32
    assert f.lr.shape == (6, 8, 12) and f.image.shape == (64, 96, 3)
    torch.testing.assert_close(f.tensor, f.pipeline.upsample(f.item))
    np.testing.assert_array_equal(np.asarray(f), f.array)
    assert "a.png: [6, 64, 96] from 8 x 12 cells, patch-means.v1 layer 0" in repr(f)


@pytest.mark.parametrize("method", METHODS)
def test_colours_and_similarities_are_those_of_the_whole_map(tmp_path: Path, method) -> None:
    f = features(draw(tmp_path / "a.png", 60, 90), method)
    dense = f.tensor
    expected = F.cosine_similarity(dense, dense[:, 20:21, 30:31], dim=0)
    found = f.similarity((30, 20))
    assert found.shape == (64, 96) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found[20, 30] == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(f.similarity((28.5, 19), original=True), found, atol=1e-5)
    colours = f.basis.to_rgb(f.basis.apply(dense)).astype(int)
    assert np.abs(f.pca().astype(int) - colours).max() <= 1


def test_no_map_of_all_channels_is_made_unasked(tmp_path: Path, monkeypatch) -> None:
    most = 0
    whole = JointBilateral.reassemble

    def watched(self, weights, value):
        nonlocal most
        most = max(most, value.shape[1])
        return whole(self, weights, value)

    monkeypatch.setattr(JointBilateral, "reassemble", watched)
    monkeypatch.setattr("fmupsample.draw.similarity.BLOCK", 2)
    f = features(draw(tmp_path / "a.png"))
    f.pca(), f.similarity((1, 2)), f.panel(), repr(f), f.lr, f.image, f.shape
    assert most == 3
    assert len(f.array) == most == 6


def test_the_map_is_made_once(tmp_path: Path, monkeypatch) -> None:
    f = features(draw(tmp_path / "a.png"))
    first = f.tensor
    monkeypatch.setattr(f.pipeline, "upsample", None)
    assert f.tensor is first and f.array.base is not None


def test_one_basis_for_several_images(tmp_path: Path) -> None:
    f, g = features([draw(tmp_path / "a.png"), draw(tmp_path / "b.png", 48, 80)])
    assert (g.pca(f.basis) != g.pca()).any()
    np.testing.assert_array_equal(g.pca(g.basis), g.pca())
    other = fmupsample.PCABasis.fit(torch.randn(9, 6), metadata={"backbone": "other"})
    with pytest.raises(UsageError, match="made from other"):
        f.pca(other)


def test_points_that_are_none(tmp_path: Path) -> None:
    f = features(draw(tmp_path / "a.png", 60, 90))
    for point in ((96, 0), (0, 64), (-1, 0), (float("nan"), 0)):
        with pytest.raises(UsageError, match="96 pixels wide and 64 high"):
            f.similarity(point)
    with pytest.raises(UsageError, match="90 pixels wide and 60 high"):
        f.similarity((90, 3), original=True)
    with pytest.raises(UsageError, match=r"a point is \(x, y\), not 7"):
        f.similarity(7)


def test_a_panel_for_notebooks(tmp_path: Path, monkeypatch) -> None:
    f = features(draw(tmp_path / "a.png"))
    drawn = Image.open(io.BytesIO(f._repr_png_()))
    assert drawn.format == "PNG" and drawn.size == f.panel().size
    shown = []
    monkeypatch.setattr(Image.Image, "show", lambda self: shown.append(self.size))
    f.show()
    assert shown == [drawn.size]


def test_images_in_every_form_and_many(pictures: Path, monkeypatch) -> None:
    monkeypatch.chdir(pictures)
    one = features("disc.png").array
    pixels = np.asarray(Image.open("disc.png").convert("RGB"))
    for image in (Path("disc.png"), Image.open("disc.png"), pixels, torch.tensor(pixels.T).mT):
        np.testing.assert_allclose(features(image).array, one)
    assert [f.item.source.path.name for f in features("deep")] == ["bar.jpg"]
    assert [f.item.source.path.name for f in features("*.png")] == ["disc.png", "square.png"]
    names = [f.item.source.path.name for f in features(["square.png", Path("disc.png")])]
    assert names == ["square.png", "disc.png"]
    assert len(list(features(np.stack([pixels, pixels])))) == 2
    assert [f.shape for f in features(Image.open(p) for p in ["disc.png"])] == [one.shape]
    assert len(list(features([pixels, "disc.png"]))) == 2


def test_images_that_cannot_be_used(pictures: Path) -> None:
    (pictures / "bad.jpg").write_text("no")
    with pytest.raises(ImageError, match=r"bad\.jpg is not a picture"):
        features(pictures / "bad.jpg")
    with pytest.raises(ImageError, match=r"bad\.jpg"):
        list(features(pictures))
    told: list[tuple[object, FmupsampleError]] = []
    assert len(list(features(pictures, on_error=lambda *what: told.append(what)))) == 3
    assert "bad.jpg" in str(told[0][0]) and len(told) == 1
    images = [np.zeros((8, 8), np.int64), gradient(40, 40)]
    assert len(list(features(images, on_error=lambda *what: told.append(what)))) == 1
    assert told[1][0] is images[0] and "int64 numbers" in str(told[1][1])


def test_models_by_name(tmp_path: Path, monkeypatch, tiny_backbone) -> None:
    loaded = []

    def load(name, layer=None, **_):
        loaded.append((name, layer))
        return tiny_backbone

    monkeypatch.setattr("fmupsample.pipeline.opening.load_backbone", load)
    path = draw(tmp_path / "a.png", 64, 64)
    options = {"backbone": "tiny", "image_size": (64, 64), "device": "cpu"}
    for _ in range(2):
        f = fmupsample.features(path, upsampler="bilinear", layer=2, **options)
    assert f.shape == (64, 64, 64) and loaded == [("tiny", 2)]
    with pytest.raises(UsageError, match="neither an upsampler"):
        fmupsample.features(path, upsampler="bilinaer", **options)
    with pytest.raises(UsageError, match="for a backbone by name"):
        fmupsample.features(path, backbone=tiny_backbone, layer=2)


def test_importing_costs_nothing() -> None:
    heavy = "{'torch', 'timm', 'numpy', 'PIL'}"
    code = f"import sys, fmupsample; dir(fmupsample); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
