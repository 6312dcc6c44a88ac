"""The vector of a whole image beside its map: from the model, through runs, in files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fmupsample
from fmupsample.backbones import load_backbone
from fmupsample.backbones.views import with_views
from fmupsample.errors import BackboneError, FeaturesError, UsageError
from fmupsample.pipeline import open_pipeline
from fmupsample_cli.main import main

# A class token, a class token and registers, a mean of tokens (EVA), and pooled maps.
KINDS = [
    "test_vit", "test_vit2", "vit_pe_spatial_tiny_patch16_512", "test_convnext",
    "test_efficientnet",
]  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("layer", [0, None])
def test_it_is_what_timm_gives_without_a_classifier(name, layer) -> None:
    backbone = load_backbone(name, layer=layer, pretrained=False)
    images = torch.randn(2, 3, 64, 96)
    features, vectors = backbone(images, return_global=True)
    torch.testing.assert_close(features, backbone(images))
    torch.testing.assert_close(vectors, backbone.model(images))
    assert vectors.shape == (2, backbone.global_channels)


def test_it_takes_one_pass(tiny_backbone) -> None:
    calls = []
    handle = tiny_backbone.model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    tiny_backbone(torch.randn(1, 3, 32, 32), return_global=True)
    handle.remove()
    assert len(calls) == 1


def test_a_model_that_does_not_pool_says_so(tiny_backbone) -> None:
    backbone = load_backbone("test_vit", pretrained=False)
    backbone.model.forward_head = lambda x: x
    with pytest.raises(BackboneError, match=r"no vector of the whole image.*\[1, 5, 64\]"):
        backbone(torch.randn(1, 3, 32, 32), return_global=True)


def test_views_give_the_mean_of_theirs(tiny_backbone) -> None:
    images = torch.full((2, 3, 64, 64), 0.3)
    images[1] = -0.5  # flat: every view sees the same
    features, vectors = with_views(tiny_backbone, 4)(images, return_global=True)
    assert features.shape == (2, 64, 8, 8)
    torch.testing.assert_close(vectors, tiny_backbone(images, return_global=True)[1])


@pytest.fixture
def models(backbone_file) -> dict[str, object]:
    return {
        "backbone_weights": backbone_file(), "upsampler": "jbu", "image_size": 64, "device": "cpu",
    }  # fmt: skip


@pytest.mark.parametrize("format", ["safetensors", "compact", "pt"])
def test_extract_keeps_it(pictures, models, tmp_path, format) -> None:
    out = tmp_path / "out"
    report = fmupsample.extract(pictures, out, format=format, global_vector=True, **models)
    plain = fmupsample.extract(pictures, tmp_path / "plain", format=format, **models)
    assert len(report.done) == 3
    pipeline = open_pipeline(**models)
    for record, without in zip(report.done, plain.done, strict=True):
        path = out / record["output"]
        assert record["global"] == [pipeline.backbone.global_channels]
        assert "global" not in without
        image = pipeline.item(record["source"]).guidance[None]
        _, (vector,) = pipeline.backbone(image, return_global=True)
        if format == "pt":
            found = torch.load(path, weights_only=True)["global"]
        else:
            found = fmupsample.open(path).global_vector
            torch.testing.assert_close(load_file(path)["global"], found)
            other = fmupsample.open(tmp_path / "plain" / without["output"])
            assert other.global_vector is None
            torch.testing.assert_close(fmupsample.open(path)[:], other[:])
        torch.testing.assert_close(found, vector, atol=1e-5, rtol=1e-4)


def test_the_command_and_shards(pictures, models, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    arguments = [
        "extract", str(pictures), "-o", str(out), "--global", "--upsampler", "jbu", "--image-size",
        "64", "--backbone-weights", str(models["backbone_weights"]), "--quiet", "--device", "cpu",
    ]  # fmt: skip
    assert main([*arguments, "--shard-size", "2", "--format", "compact"]) == 0
    shards = fmupsample.open_shards(out)
    assert [shards[key].global_vector.shape for key in shards] == [(64,)] * 3
    records = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert any(record.get("options", {}).get("global") for record in records)
    assert main([*arguments, "--format", "npy"]) == 2
    assert "--format safetensors with --global" in " ".join(capsys.readouterr().err.split())


def test_windows_take_it_from_the_overview(pictures, models, tmp_path) -> None:
    large = pictures / "disc.png"
    options = {**models, "image_size": (128, 192), "tokens_only": True, "global_vector": True}
    windows = fmupsample.extract(large, tmp_path / "w", window=64, **options)
    (record,) = windows.done
    found = fmupsample.open(tmp_path / "w" / record["output"]).global_vector
    assert found.shape == (64,) and found.isfinite().all()


def test_other_options_are_another_run(pictures, models, tmp_path) -> None:
    fmupsample.extract(pictures, tmp_path, tokens_only=True, **models)
    with pytest.raises(UsageError, match="global"):
        fmupsample.extract(pictures, tmp_path, tokens_only=True, global_vector=True, **models)


def test_a_damaged_vector_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"features": torch.zeros(2, 3, 4), "global": torch.zeros(2, 2)}, path)
    with pytest.raises(FeaturesError, match=r"its global vector is \[2, 2\]"):
        fmupsample.open(path)
