"""The recipes that train feature sources, for a few steps on drawn pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fmupsample import load_backbone

RECIPES = Path(__file__).parents[1] / "weights" / "recipes"


@pytest.fixture
def recipes(monkeypatch):
    """The module train_source; its neighbours have names too common to stay importable."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(RECIPES))
    import train_source

    yield train_source
    for name in set(sys.modules) - before:
        if str(RECIPES) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def pictures(tmp_path) -> list[str]:
    """Options that name folders of drawn pictures: two classes, and some without a class."""
    rng = np.random.default_rng(0)
    for i, folder in enumerate(["labelled/a", "labelled/b", "plain"] * 3):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)
        picture.save(tmp_path / folder / f"{i}.png")
    return ["--images", str(tmp_path / "plain"), "--labelled", str(tmp_path / "labelled")]


def small(source) -> list[str]:
    """Options that make a run of any source short: one block, few small pictures."""
    args = source.model_args | ({"depth": 1} if "depth" in source.model_args else {})
    options = ["--model-args", json.dumps(args), "--phases", "1:32:2:0.5", "--side", "64"]
    options += ["--held-out", "2"] if source.plain else ["--prototypes", "8"]
    return [*options, "--device", "cpu"]


@pytest.mark.parametrize("name", ["sup-vit", "conv", "mim-vit", "dino-vit", "wide-vit"])
def test_a_source_is_a_backbone_as_its_row_says(recipes, pictures, tmp_path, name):
    source = recipes.SOURCES[name]
    out = ["-o", str(tmp_path / "out")]
    recipes.main([name, *pictures, *out, *small(source), "--steps", "2"])
    backbone = load_backbone(source.architecture, weights=tmp_path / "out" / f"{name}.safetensors")
    assert (backbone.channels, backbone.stride) == (source.width, (source.patch,) * 2)
    assert backbone.name.startswith(f"source-{name}.local-")
    sides = (7 * source.patch, 12 * source.patch) if source.patch == 14 else (96, 160)
    features = backbone(torch.randn(1, 3, *sides))
    assert torch.isfinite(features).all() and features.std((2, 3)).mean() > 1e-3


def test_every_source_is_tried_here(recipes):
    assert sorted(recipes.SOURCES) == ["conv", "dino-vit", "mim-vit", "sup-vit", "wide-vit"]


@pytest.mark.parametrize("name", ["conv", "mim-vit"])
def test_a_run_started_again_goes_on(recipes, pictures, tmp_path, capsys, name):
    out = ["-o", str(tmp_path / "out")]
    options = [name, *pictures, *out, *small(recipes.SOURCES[name])]
    recipes.main([*options, "--steps", "2"])
    recipes.main([*options, "--steps", "3"])
    assert "continuing at step 2" in capsys.readouterr().out
    saved = torch.load(tmp_path / "out" / "runs" / name / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 3


@pytest.mark.parametrize("objective", ["mask", "contrast"])
def test_a_part_of_the_patches_is_enough(recipes, objective):
    """On pictures whose patches are all alike, what is seen tells all about what is not."""
    torch.manual_seed(0)
    vit = recipes.train_plain.make_backbone(
        "vit_tiny_patch16_224", {"depth": 1, "dynamic_img_size": True, "num_classes": 0}
    )
    learner = recipes.train_plain.VITS[objective](vit)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=2e-3)
    pictures = torch.randn(4, 3, 16, 16).repeat(learner.views, 1, 4, 4)  # tiles, once per view
    losses = []
    for _ in range(30):
        loss = learner(pictures, torch.zeros(len(pictures)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_labels_need_classes(recipes, tmp_path, pictures):
    only_plain = [*pictures[:2], "--minutes", "1", "-o", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="2 classes or more, not 0"):
        recipes.train_plain.main(
            ["--objective", "label", "--architecture", "resnet10t", "--side", "64", *only_plain]
        )
