"""The recipes of shipped weights and of feature sources, for a few steps on drawn pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import distil
import publish
import train_plain
import train_source
from backbone import DEFAULT_ARGS, save_embedded
from crops import Folder, Source
from distil import Pool
from fmupsample import load_backbone
from prune import build_student, narrow
from train_source import SOURCES


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
def test_a_source_is_a_backbone_as_its_row_says(pictures, tmp_path, name):
    source = SOURCES[name]
    out = ["-o", str(tmp_path / "out")]
    train_source.main([name, *pictures, *out, *small(source), "--steps", "2"])
    backbone = load_backbone(source.architecture, weights=tmp_path / "out" / f"{name}.safetensors")
    assert (backbone.channels, backbone.stride) == (source.width, (source.patch,) * 2)
    assert backbone.name.startswith(f"source-{name}.local-")
    sides = (7 * source.patch, 12 * source.patch) if source.patch == 14 else (96, 160)
    features = backbone(torch.randn(1, 3, *sides))
    assert torch.isfinite(features).all() and features.std((2, 3)).mean() > 1e-3


def test_every_source_is_tried_here():
    assert sorted(SOURCES) == ["conv", "dino-vit", "mim-vit", "sup-vit", "wide-vit"]


@pytest.mark.parametrize("name", ["conv", "mim-vit"])
def test_a_run_started_again_goes_on(pictures, tmp_path, capsys, name):
    out = ["-o", str(tmp_path / "out")]
    options = [name, *pictures, *out, *small(SOURCES[name])]
    train_source.main([*options, "--steps", "2"])
    train_source.main([*options, "--steps", "3"])
    assert "continuing at step 2" in capsys.readouterr().out
    saved = torch.load(tmp_path / "out" / "runs" / name / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 3


@pytest.mark.parametrize("objective", ["mask", "contrast"])
def test_a_part_of_the_patches_is_enough(objective):
    """On pictures whose patches are all alike, what is seen tells all about what is not."""
    torch.manual_seed(0)
    vit = train_plain.make_backbone(
        "vit_tiny_patch16_224", {"depth": 1, "dynamic_img_size": True, "num_classes": 0}
    )
    learner = train_plain.VITS[objective](vit)
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


def test_labels_need_classes(tmp_path, pictures):
    only_plain = [*pictures[:2], "--minutes", "1", "-o", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="2 classes or more, not 0"):
        train_plain.main(
            ["--objective", "label", "--architecture", "resnet10t", "--side", "64", *only_plain]
        )


# --- the embedded backbone ------------------------------------------------------------------------


@pytest.fixture
def teacher(tmp_path) -> Path:
    """A file of a ViT-S/14 with four blocks and random weights."""
    torch.manual_seed(0)
    name, args = "vit_small_patch14_dinov2", DEFAULT_ARGS | {"depth": 4}
    model = timm.create_model(name, **args)
    for parameter in (*model.blocks.parameters(), model.pos_embed):
        torch.nn.init.normal_(parameter, 0, 0.05)
    save_embedded(tmp_path / "teacher.safetensors", model, name, args, "t", 224, {})
    return tmp_path / "teacher.safetensors"


@pytest.fixture
def options(tmp_path, pictures, teacher) -> list[str]:
    """Options of a short run of distil.py."""
    return [
        *("--teacher", str(teacher), "--teacher-name", "embedded", "--layer", "3"),
        *("--images", str(tmp_path / "plain"), f"{tmp_path / 'labelled'}:2"),
        *("--held-out", "2", "--held-out-size", "28", "--calibrate", "20", "--depth", "2"),
        *("--phases", "0.5:28x28:4", "0.5:28x42:2", "-o", str(tmp_path / "run")),
    ]


def test_a_distilled_backbone_is_published(options, tmp_path, capsys):
    distil.main([*options, "--steps", "2"])
    distil.main([*options, "--steps", "4"])
    assert "continuing at step 2" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2, 4] and rows[-1]["held_out_cosine"] < 2
    (tmp_path / "card.json").write_text('{"data": "drawn"}')
    path = tmp_path / "embedded.safetensors"
    publish.main(
        ["--run", str(tmp_path / "run"), "--card", str(tmp_path / "card.json"), "-o", str(path)]
    )
    backbone = load_backbone("embedded", weights=path)
    assert backbone.name.startswith("embedded.v2.local-") and backbone.card["steps"] == 4
    assert (backbone.channels, backbone.stride, backbone.layer) == (384, (14, 14), 1)
    assert backbone.model.blocks[0].mlp.fc1.out_features == 288
    assert torch.isfinite(backbone(torch.randn(1, 3, 42, 28))).all()


def test_a_student_as_wide_and_deep_as_the_teacher_is_the_teacher(teacher):
    teach = distil.Teacher(teacher, "embedded", 3)
    crops = torch.randint(0, 256, (40, 3, 112, 112), dtype=torch.uint8)
    images, model = teach.normalise(crops), teach.backbone.model
    missed = []
    for ratio in (0.5, 1.0, 4.0):
        vit, args = build_student(depth=4, mlp_ratio=ratio, img_size=224)
        missed.append(narrow(vit, model, images)[-1])
        assert args["mlp_ratio"] == ratio
    assert missed[0] > missed[1] > missed[2] and missed[2] < 1e-3
    student = distil.Student(vit.eval())
    torch.nn.init.eye_(student.head.weight)
    torch.nn.init.zeros_(student.head.bias)
    objective = distil.Objective(384, alike=1.0)
    with torch.no_grad():
        wanted = teach(crops[:4])
        terms = objective(student, images[:4], wanted)
    assert all(value < 0.02 for value in terms.values())


def test_held_out_images_are_not_drawn(pictures, tmp_path):
    (tmp_path / "plain" / "labels").mkdir()
    (tmp_path / "plain" / "2.png").rename(tmp_path / "plain" / "labels" / "2.png")
    folders = [Folder.parse(str(tmp_path / "plain")), Folder.parse(f"{tmp_path}/labelled:3")]
    source = Source(folders, held_out=3, seed=0)
    assert len(source.held_out) == 3 and source.weights == [1.0, 3.0]
    left = [path for files in source.files for path in files]
    assert not set(left) & set(source.held_out)
    assert not [path for path in left if path.parent.name == "labels"]
    assert source.draw(28, 42).shape == (3, 28, 42)


def test_a_pool_asks_for_crops_in_time():
    pool = Pool(capacity=6, reuse=2)
    for _ in range(5):
        if pool.hungry:
            pool.add(torch.zeros(4, 3, 14, 14, dtype=torch.uint8), torch.zeros(4, 1, 8))
        assert [len(part) for part in pool.draw(4)] == [4, 4]
    assert (pool.count, len(pool.crops)) == (12, 6)
