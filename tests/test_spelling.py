"""Words as people type them: capitals, PyTorch's and other libraries' names, near misses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fmupsample
from fmupsample.backbones.aliases import ALIASES, OTHER_NAMES
from fmupsample.backbones.names import resolve
from fmupsample.device import check_precision
from fmupsample.errors import BackboneError, UsageError
from fmupsample.number_formats import number_format
from fmupsample.pipeline import open_pipeline
from fmupsample.training.config import TrainConfig
from fmupsample.upsamplers import JointBilateral
from fmupsample.upsamplers.registry import METHODS, current_name, learned_method
from fmupsample_cli.main import main


def test_capitals_and_underscores_do_not_matter(tiny_backbone) -> None:
    assert isinstance(fmupsample.load_upsampler(tiny_backbone, "JBU"), JointBilateral)
    assert current_name("LDA_AQU") == "lda-aqu" and current_name("ReSFU") == "resfu"
    assert TrainConfig(upsampler="ReSFU").upsampler == "resfu"
    assert current_name("Head.safetensors") == "Head.safetensors"
    assert all(current_name(name.upper()) == name for name in METHODS)


def test_near_misses_are_guessed(tiny_backbone) -> None:
    with pytest.raises(UsageError, match="did you mean bilinear"):
        fmupsample.load_upsampler(tiny_backbone, "bilinaer")
    with pytest.raises(UsageError, match=r"nor a head file$"):
        fmupsample.load_upsampler(tiny_backbone, "xyz")
    with pytest.raises(UsageError, match="did you mean dysample"):
        learned_method("dy-sample")


@pytest.mark.parametrize(
    ("said", "meant"),
    [("float16", "fp16"), ("half", "fp16"), ("BF16", "bf16"), ("bfloat16", "bf16"),
     ("float", "fp32"), (torch.float32, "fp32"), ("fp8", "fp8")],
)  # fmt: skip
def test_number_formats(said, meant) -> None:
    assert number_format(said) == meant


def test_number_formats_in_the_library(tiny_backbone, pictures, tmp_path) -> None:
    pipeline = open_pipeline(tiny_backbone, "jbu", precision="bfloat16", device="cpu")
    assert (pipeline.precision, pipeline.dtype) == ("bf16", torch.bfloat16)
    resolved = TrainConfig(precision="float32").resolve(tiny_backbone, torch.device("cpu"))
    assert resolved.precision == "fp32"
    with pytest.raises(UsageError, match="precision 'fp8' is unknown"):
        check_precision("fp8", torch.device("cpu"))
    image = pictures / "disc.png"
    report = fmupsample.extract(
        image, tmp_path, backbone=tiny_backbone, upsampler="jbu", image_size=64, dtype="half",
        tokens_only=True,
    )  # fmt: skip
    (record,) = report.done
    assert record["dtype"] == "fp16"
    assert load_file(tmp_path / record["output"])["features"].dtype == torch.float16


def test_number_formats_of_the_command(pictures, backbone_file, tmp_path, capsys) -> None:
    arguments = [
        "extract", str(pictures), "-o", str(tmp_path / "o"), "--backbone-weights",
        str(backbone_file()), "--image-size", "64", "--tokens-only", "--quiet", "--device", "cpu",
    ]  # fmt: skip
    assert main([*arguments, "--dtype", "Float32", "--precision", "bfloat16"]) == 0
    path = next(Path(tmp_path / "o").rglob("*.safetensors"))
    assert load_file(path)["features"].dtype == torch.float32
    for option, word in (("--dtype", "int8"), ("--precision", "tf32")):
        assert main([*arguments, option, word]) == 2
        said = capsys.readouterr().err
        assert f"'{word}' is not one of fp32" in said and "Value error" not in said


@pytest.mark.parametrize(
    ("value", "words"),
    [("0", "'--batch-size': it must be 1 or more"), ("x", "'--batch-size': it must be a whole")],
)
def test_numbers_that_do_not_fit(value, words, capsys) -> None:
    assert main(["extract", "a.png", "-o", "out", "--batch-size", value]) == 2
    said = capsys.readouterr().err
    assert "Input should" not in said
    # Older versions of Typer say it well by themselves.
    assert words in said or "is not in the range" in said or "is not a valid int" in said


def test_names_of_other_libraries() -> None:
    assert set(OTHER_NAMES.values()) <= set(ALIASES)
    assert all(name == name.lower() for name in OTHER_NAMES)
    for name, alias in (
        ("facebook/dinov2-small", "dinov2-s"),
        ("dinov2_vitb14_reg", "dinov2-b-reg"),
    ):
        with pytest.raises(BackboneError, match=rf"did you mean {alias}\?"):
            resolve(name)
