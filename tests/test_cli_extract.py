"""``fmupsample extract`` as it is typed: options, streams, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from drawn import Blocks, PatchMeans, draw
from safetensors.torch import load_file
from typer.testing import CliRunner

import fmupsample
from fmupsample.upsamplers import load_upsampler
from fmupsample_cli import loading
from fmupsample_cli.main import build_app, main


@pytest.fixture(autouse=True)
def small_models(monkeypatch) -> list[dict]:
    """Every model is PatchMeans and Blocks; the list holds what was asked for."""
    asked = []

    def load(backbone, layer, weights, upsampler, head, device, *, image_size=None, **_):
        asked.append({"upsampler": upsampler, "head": head, "image_size": image_size})
        return PatchMeans(), Blocks()

    monkeypatch.setattr(loading, "load_models", load)
    return asked


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("a.png", "sub/b.jpg"):
        draw(tmp_path / "photos" / name)
    return tmp_path / "photos"


def call(*arguments: object) -> int:
    return main(["extract", *map(str, arguments), "--device", "cpu"])


def test_help_speaks_of_every_option() -> None:
    result = CliRunner().invoke(build_app(), ["extract", "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for option in (
        "--output", "--list", "--backbone", "--layer", "--backbone-weights", "--upsampler",
        "--head", "--fit-head", "--image-size", "--fit", "--format", "--dtype", "--weight-bits",
        "--output-size", "--every", "--from", "--to",
        "--tokens-only", "--pca", "--shard-size", "--device", "--backend", "--precision",
        "--batch-size", "--workers", "--overwrite", "--json", "--quiet",
    ):  # fmt: skip
        assert option in result.output, option


def test_a_folder(photos: Path, tmp_path: Path, capsys) -> None:
    assert call(photos, "-o", tmp_path / "out") == 0
    streams = capsys.readouterr()
    assert "2 done" in streams.out and "6 x 32 x 48, fp16" in streams.out
    assert str(tmp_path / "out" / "manifest.jsonl") in streams.out
    assert "free" in streams.err and "free" not in streams.out
    assert load_file(tmp_path / "out/sub/b.safetensors")["features"].shape == (6, 32, 48)
    assert call(photos, "-o", tmp_path / "out") == 0
    assert "2 finished before" in capsys.readouterr().out


def test_json_is_all_that_goes_to_standard_output(photos: Path, tmp_path: Path, capsys) -> None:
    (photos / "bad.png").write_text("no")
    assert call(photos, "-o", tmp_path / "out", "--json", "--pca", 2) == 3
    streams = capsys.readouterr()
    summary = json.loads(streams.out)
    assert (summary["done"], summary["failed"], summary["skipped"]) == (2, 1, 0)
    assert summary["failures"][0]["source"].endswith("bad.png")
    assert summary["shapes"] == [[2, 32, 48]] and summary["options"]["pca"] == 2
    assert summary["bytes"] > 2 * 2 * 32 * 48 * 2
    assert "bad.png is not a picture" in streams.err


def test_exit_codes_of_failures(photos: Path, tmp_path: Path, capsys) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_text("no picture")
    assert call(photos, bad, "-o", tmp_path / "some") == 3
    assert call(bad, "-o", tmp_path / "none") == 1
    assert "1 failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jpg", "-o", "out"], "nowhere.jpg does not exist"),
        (["-o", "out"], "no pictures named"),
        (["photos", "-o", "out", "--image-size", "big"], "image size 'big' is not understood"),
        (["photos", "-o", "out", "--image-size", "33x32"], "the nearest is 32x32"),
        (["photos", "-o", "out", "--output-size", "big"], "output size 'big' is not understood"),
        (["photos", "-o", "out", "--format", "npy", "--dtype", "bf16"], "npy has no bf16"),
        (["photos", "-o", "out", "--pca", "7"], "give 1 to 6"),
        (["photos", "-o", "out", "--format", "compact"], "no kernel weights that a compact file"),
        (["photos", "-o", "out", "--precision", "fp16"], "fp16 needs a GPU"),
        (["photos", "-o", "out", "--format", "hdf5"], "hdf5"),
        (["photos"], "--output"),
    ],
)
def test_usage_errors_start_nothing(
    arguments: list[str], message: str, photos: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    streams = capsys.readouterr()
    assert message in streams.err and streams.out == ""
    assert "Traceback" not in streams.err
    assert not Path("out").exists()


def test_options_reach_the_library(photos: Path, tmp_path: Path, small_models) -> None:
    out = tmp_path / "out"
    assert call(photos, "-o", out, "--image-size", "24x64", "--format", "npy", "--dtype", "fp32",
                "--output-size", "x2", "--layer", "3", "--upsampler", "jbu", "-q") == 0  # fmt: skip
    array = np.load(out / "a.npy")
    assert array.shape == (6, 6, 16) and array.dtype == np.float32
    assert small_models == [{"upsampler": "jbu", "head": None, "image_size": (24, 64)}]


def test_compact_files(photos: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    models = PatchMeans(), load_upsampler(PatchMeans(), "jbu")
    monkeypatch.setattr(loading, "load_models", lambda *a, **k: models)
    out = tmp_path / "out"
    assert call(photos, "-o", out, "--format", "compact", "--weight-bits", 8, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["shapes"] == [[6, 32, 48]] and summary["options"]["weight_bits"] == 8
    assert fmupsample.open(out / "sub/b.safetensors")[:, :4, :4].shape == (6, 4, 4)
    assert call(photos, "-o", out, "--format", "compact") == 2
    assert "weight bits 8 (now 16)" in capsys.readouterr().err


def test_tokens_only_asks_for_no_head(photos: Path, tmp_path: Path, small_models, capsys) -> None:
    assert call(photos, "-o", tmp_path / "out", "--tokens-only") == 0
    assert small_models[0]["upsampler"] == "nearest"
    assert "none, low-resolution features" in capsys.readouterr().out


def test_list_file_and_quiet(photos: Path, tmp_path: Path, capsys) -> None:
    (photos / "list.txt").write_text("# one\nsub/b.jpg\n")
    assert call("--list", photos / "list.txt", "-o", tmp_path / "out", "--quiet") == 0
    assert capsys.readouterr().err == ""
    assert (tmp_path / "out/sub/b.safetensors").exists()


def test_ctrl_c(tmp_path: Path) -> None:
    """Stops within a moment, exit code 130, finished results stay, no half file, and it goes on."""
    for i in range(40):
        draw(tmp_path / "photos" / f"{i:02}.png")
    code = textwrap.dedent("""
        import signal, sys, time
        # What a shell runs in the background ignores it, and so would this.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.path.insert(0, sys.argv[1])
        from drawn import Blocks, PatchMeans
        from fmupsample_cli import loading
        from fmupsample_cli.main import main

        class Slow(PatchMeans):
            def forward(self, images):
                time.sleep(0.1)
                return super().forward(images)

        loading.load_models = lambda *a, **k: (Slow(), Blocks())
        sys.exit(main(["extract", *sys.argv[2:]]))
    """)
    here, out = Path(__file__).parent, tmp_path / "out"
    command = [sys.executable, "-c", code, str(here), str(tmp_path / "photos"), "-o", str(out)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    stdout, stderr = process.communicate(timeout=30)
    assert time.monotonic() - began < 5
    assert process.returncode == 130, stderr
    assert "of 40 pictures are finished; the same command goes on from there" in stderr
    assert "Traceback" not in stderr and stdout == ""
    finished = len(list(out.glob("*.safetensors")))
    assert 3 <= finished < 40
    assert sorted(p.name for p in out.glob(".*")) == []
    records = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert sum(r["status"] == "ok" for r in records) == finished
    assert call(tmp_path / "photos", "-o", out, "--quiet") == 0
    assert len(list(out.glob("*.safetensors"))) == 40
