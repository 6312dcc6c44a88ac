"""``fmupsample models`` and ``doctor``, and how options become models."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import fmupsample_weights
from fmupsample.backbones.aliases import ALIASES
from fmupsample.errors import BackboneError, UsageError
from fmupsample_cli.loading import load_models
from fmupsample_cli.main import main


@pytest.fixture
def shipped(backbone_file, monkeypatch):
    """A weights folder with an embedded backbone and nothing else."""
    path = backbone_file()
    monkeypatch.setattr(fmupsample_weights, "FOLDER", path.parent)
    return path


def listed(capsys, *arguments: str) -> list[dict]:
    assert main(["models", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_models_lists_the_shipped_one_first_and_every_alias(shipped, capsys):
    rows = listed(capsys)
    assert [row["name"] for row in rows] == ["embedded", *ALIASES]
    assert rows[0]["state"] == "shipped" and rows[0]["tag"] == "embedded.v1"
    assert rows[0]["bytes"] == shipped.stat().st_size
    assert {row["state"] for row in rows[1:]} == {"download"}
    dinov2 = next(row for row in rows if row["name"] == "dinov2-s")
    assert dinov2["bytes"] == pytest.approx(88.4e6, rel=0.01)


def test_models_knows_what_is_cached(capsys, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--timm--vit_small_patch14_dinov2.lvd142m"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "model.safetensors").write_bytes(b"1234")
    (row,) = listed(capsys, "vit_small_patch14_dinov2.*")
    assert (row["state"], row["bytes"]) == ("cached", 4)


def test_models_names_the_heads_there_are(shipped, capsys):
    header = {"format": "fmupsample-head/1", "backbone": json.dumps({"name": "embedded.v1"})}
    save_file({"x": torch.zeros(1)}, shipped.parent / "embedded-head.safetensors", metadata=header)
    assert listed(capsys, "embedded")[0]["heads"] == ["embedded-head"]


def test_both_sides_look_for_heads_in_the_same_folder():
    from fmupsample.folders import cache_folder
    from fmupsample.upsamplers.loading import head_folders

    assert cache_folder() / "heads" in head_folders()


def test_patterns_match_names_tags_and_descriptions(capsys):
    assert {row["name"] for row in listed(capsys, "dino-*")} == {
        "dino-s16", "dino-s8", "dino-b16", "dino-b8",
    }  # fmt: skip
    assert {row["name"] for row in listed(capsys, "samvit")} == {"sam-b", "sam-l"}
    assert main(["models", "no-such-thing"]) == 1
    assert "`fmupsample models --all`" in capsys.readouterr().err


def test_all_of_timm_can_be_searched(capsys):
    rows = listed(capsys, "resnet50.*", "--all")
    assert rows[0]["name"] == "resnet50"
    assert len(rows) > 10 and len({row["tag"] for row in rows}) == len(rows)


def test_the_table_is_for_people(shipped, capsys):
    assert main(["models", "dinov2-s"]) == 0
    out = capsys.readouterr().out
    assert "vit_small_patch14_dinov2.lvd142m" in out and "download 88.4 MB" in out


def doctored(capsys) -> tuple[int, dict[str, dict]]:
    code = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] == (code == 0)
    return code, {check["what"]: check for check in report["checks"]}


def test_doctor_reports_versions_devices_and_caches(capsys, shipped):
    _, checks = doctored(capsys)
    assert torch.__version__.startswith(checks["torch"]["found"].partition("+")[0])
    assert "threads" in checks["cpu"]["found"]
    assert checks["CUDA extension"]["state"] in ("ok", "note")
    assert "0 timm models" in checks["hub cache"]["found"]
    assert checks["embedded.safetensors"]["found"].startswith("embedded.v1, ")


def test_doctor_finds_what_is_broken(capsys, shipped):
    shipped.write_bytes(shipped.read_bytes()[:-100])
    code, checks = doctored(capsys)
    assert code == 1 and checks["embedded.safetensors"]["state"] == "BROKEN"
    shipped.unlink()
    code, checks = doctored(capsys)
    assert code == 1 and "no embedded.safetensors" in checks["embedded"]["found"]


def test_load_models_takes_a_method_and_says_what_it_took(shipped, capsys):
    backbone, upsampler = load_models(upsampler="bilinear", device="cpu", layer="-2")
    assert (backbone.name, backbone.layer, upsampler.name) == ("embedded.v1", 4, "bilinear")
    err = capsys.readouterr().err
    assert "embedded.v1" in err and "bilinear" in err and "cpu" in err
    load_models(upsampler="nearest", device="cpu", quiet=True)
    assert capsys.readouterr().err == ""


def test_head_and_upsampler_exclude_each_other(tmp_path):
    with pytest.raises(UsageError, match="exclude each other"):
        load_models(upsampler="jbu", head=tmp_path / "head.safetensors")


def test_an_unknown_backbone_ends_before_the_upsampler(shipped):
    with pytest.raises(BackboneError, match="there is no backbone 'dinov9'"):
        load_models("dinov9", device="cpu")
