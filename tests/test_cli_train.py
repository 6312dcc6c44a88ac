"""``fmupsample train`` and ``--fit-head`` as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_training import SMALL, draw_pictures
from toy import ToyBackbone
from typer.testing import CliRunner

import fmupsample.backbones
from fmupsample.training import fit, validate
from fmupsample.training.config import TrainConfig
from fmupsample.upsamplers.heads import read_head_metadata
from fmupsample_cli.main import build_app, main


@pytest.fixture(autouse=True)
def toy(monkeypatch, tmp_path) -> None:
    """Every backbone is the toy one, and the cache is this test's own."""
    monkeypatch.setattr(
        fmupsample.backbones, "load_backbone", lambda *_, **__: ToyBackbone(), raising=False
    )
    monkeypatch.setenv("FMUPSAMPLE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return draw_pictures(tmp_path / "pictures")


def call(command: str, *arguments: object) -> int:
    return main([command, *map(str, arguments), "--device", "cpu"])


def test_help_speaks_of_every_option() -> None:
    result = CliRunner().invoke(build_app(), ["train", "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for option in (
        "--output", "--list", "--backbone", "--layer", "--backbone-weights", "--upsampler",
        "--from", "--image-size", "--val", "--masks", "--steps",
        "--batch-size", "--lr", "--seed",
        "--objective", "--config", "--resume", "--work", "--overwrite", "--device", "--backend",
        "--precision", "--workers", "--json", "--quiet",
    ):  # fmt: skip
        assert option in result.output, option


def test_options_reach_the_run(pictures, tmp_path, capsys) -> None:
    output, work = tmp_path / "head.safetensors", tmp_path / "work"
    val = draw_pictures(tmp_path / "val", 3)
    options = tmp_path / "options.json"
    options.write_text(json.dumps({**SMALL, "lr": 0.5}))
    assert call(
        "train", pictures, "-o", output, "--config", options, "--work", work, "--steps", 2,
        "--batch-size", 3, "--lr", 0.002, "--seed", 7, "--image-size", "32,40", "--val", val,
        "--objective", "crops,clusters=0.5", "--precision", "bf16", "--workers", 1, "--json",
    ) == 0  # fmt: skip
    streams = capsys.readouterr()
    summary = json.loads(streams.out)
    config = summary["config"]
    assert (config["steps"], config["batch_size"], config["lr"], config["seed"]) == (2, 3, 0.002, 7)
    assert config["image_sizes"] == [32, 40] and config["precision"] == "bf16"
    assert config["objective"] == {"crops": 1.0, "clusters": 0.5}
    assert summary["held_out_pictures"] == 3 and summary["best_step"] == 2
    assert summary["work"] == str(work) and (work / "log.jsonl").exists()
    assert "held_out" in summary and isinstance(summary["better_than_bilinear"], bool)
    assert "2 steps of 3 crops of 32x32 and 40x40" in streams.err
    assert read_head_metadata(output)["card"]["data"] == "pictures; no labels"


def test_masks_are_what_is_trained_for_where_they_are_given(tmp_path, capsys) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 8, labels=tmp_path / "masks")
    (tmp_path / "more=1").mkdir()
    (tmp_path / "masks" / "03.png").rename(tmp_path / "more=1" / "03.png")
    options = {**SMALL, "steps": 2}
    del options["objective"]
    options["upsampler_config"] = {"embedding": 8, "width": 8, "detail": 4, "key_width": 8}
    assert call(
        "train", pictures, "-o", tmp_path / "head.safetensors", "--upsampler", "affinity",
        "--config", json.dumps(options),
        "--masks", f"{tmp_path / 'masks'}=0.5", "--masks", tmp_path / "more=1", "--json",
    ) == 0  # fmt: skip
    summary = json.loads(capsys.readouterr().out)
    assert summary["config"]["objective"] == {"masks": 1.0}
    head = read_head_metadata(tmp_path / "head.safetensors")
    assert head["backbone"] == {"name": "any"} and head["upsampler"] == "affinity"


def test_the_summary_for_people(pictures, tmp_path, capsys, monkeypatch) -> None:
    output = tmp_path / "head.safetensors"
    monkeypatch.setattr(validate, "NO_BETTER", 0.0)
    assert call("train", pictures, "-o", output, "--config", json.dumps(SMALL)) == 0
    streams = capsys.readouterr()
    assert (
        "7 trained on, 1 held out" in streams.out and "of bilinear interpolation's" in streams.out
    )
    assert "no better than bilinear interpolation" in streams.err
    assert call("train", pictures, "-o", tmp_path / "q.safetensors", "-q", "--config",
                json.dumps({**SMALL, "held_out": 0, "steps": 1})) == 0  # fmt: skip
    assert "nothing was held out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "-o", "h.safetensors"], "nowhere does not exist"),
        (["pictures"], "--output"),
        (["pictures", "-o", "head.pt"], "must be named *.safetensors"),
        (["pictures", "-o", "h.safetensors", "--image-size", "big"], "is not understood"),
        (["pictures", "-o", "h.safetensors", "--objective", "edges"], "no term edges"),
        (["pictures", "-o", "h.safetensors", "--config", "{"], "not JSON"),
        (["pictures", "-o", "h.safetensors", "--config", '{"a": 1}'], "no option 'a'"),
        (["pictures", "-o", "h.safetensors", "--upsampler", "jbu"], "not an upsampler with param"),
        (["pictures", "-o", "h.safetensors", "--precision", "fp16"], "fp16 needs a GPU"),
        (["pictures", "-o", "h.safetensors", "--objective", "task"], "no term task"),
        (["pictures", "-o", "h.safetensors", "--objective", "masks"], "needs --masks"),
        (["pictures", "-o", "h.safetensors", "--masks", "a=-1"], "'a=-1' is not understood"),
        (["pictures", "-o", "h.safetensors", "--masks", "nowhere"], "nowhere does not exist"),
        (["pictures/00.png", "-o", "h.safetensors"], "at least 4 usable pictures and has 1"),
    ],
)
def test_usage_errors_start_nothing(
    arguments, message, pictures, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("train", *arguments) == 2
    streams = capsys.readouterr()
    assert message in streams.err and streams.out == "" and "Traceback" not in streams.err
    assert not list(tmp_path.glob("h.safetensors*"))


def test_fit_head(pictures, tmp_path, monkeypatch, capsys) -> None:
    """No head for this backbone: one is trained, kept, and used; the next run finds it."""
    train = fit.train

    def quickly(backbone, sources, output, config, **more):
        small = {**SMALL, "steps": 2, "previews": 0, "upsampler": config.upsampler}
        small["upsampler_config"] = {}
        return train(backbone, sources, output, TrainConfig.from_dict(small), **more)

    monkeypatch.setattr(fit, "train", quickly)
    assert call("extract", pictures, "-o", tmp_path / "none", "--upsampler", "resfu") == 1
    assert "there is no head for toy.v1" in capsys.readouterr().err
    assert call("extract", pictures, "-o", tmp_path / "any", "--pca", 3) == 0
    assert "backbone toy.v1" in (said := capsys.readouterr().err) and "affinity" in said
    assert call("extract", pictures, "-o", tmp_path / "out", "--fit-head", "--pca", 3) == 0
    streams = capsys.readouterr()
    assert "training one on these pictures" in streams.err and "8 done" in streams.out
    heads = list((tmp_path / "cache/heads").glob("*.safetensors"))
    assert [h.name for h in heads] == ["toy.v1-layer11-0123456789ab.bilateral-cells.safetensors"]
    monkeypatch.setattr(fit, "train", None)
    assert call("visualize", pictures, "-o", tmp_path / "drawn", "--fit-head") == 0
    assert call("extract", pictures, "-o", tmp_path / "more", "--pca", 3) == 0
    assert "training" not in capsys.readouterr().err
    assert call("extract", pictures, "-o", tmp_path / "x", "--fit-head", "--upsampler", "jbu") == 2
    assert "--upsampler jbu has none" in capsys.readouterr().err
