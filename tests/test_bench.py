"""``fmupsample bench``: what it writes and says, and probes on methods that are not linear."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from reference import anyup
from toy import ToyBackbone, ToyUpsampler
from typer.testing import CliRunner

from fmupsample.backbones import load_backbone
from fmupsample.bench import chart, pictures, run, tables
from fmupsample.bench.methods import choose
from fmupsample.bench.quality import split, spread
from fmupsample.bench.run import BenchReport
from fmupsample.errors import UsageError
from fmupsample.images import ImageSize, find_images
from fmupsample.labels import open_dataset, survey
from fmupsample.pipeline import Pipeline
from fmupsample.probing.sampled import Comparison, features_at
from fmupsample.upsamplers import Bilinear, Upsampler, save_head
from fmupsample.upsamplers.registry import METHODS
from fmupsample_cli.main import build_app, main

SMALL = ("--device", "cpu", "--sizes", "56", "--rounds", "1")
KEYS = {
    "size", "upsampler", "method", "weights", "pixels", "cells", "parameters", "macs", "median_s",
    "quartiles_s", "rounds", "peak_bytes", "output_bytes", "of_backbone", "reason",
}  # fmt: skip


def labelled(root: Path, count: int = 6) -> Path:
    """``images/`` and ``labels/``: a disc (1) on a ground (0), a row that does not count."""
    random = np.random.default_rng(0)
    for number in range(count):
        picture, labels = Image.new("RGB", (72, 64), (30, 90, 200)), Image.new("L", (72, 64), 0)
        x, y = (int(v) for v in random.integers(4, 30, 2))
        ImageDraw.Draw(picture).ellipse((x, y, x + 26, y + 26), fill=(230, 60, 40))
        ImageDraw.Draw(labels).ellipse((x, y, x + 26, y + 26), fill=1)
        ImageDraw.Draw(labels).line((0, 0, 71, 0), fill=255)
        for folder, image in (("images", picture), ("labels", labels)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            image.save(root / folder / f"{number}.png")
    return root


def test_a_small_bench_writes_everything(tmp_path):
    out = tmp_path / "bench"
    labelled(tmp_path)
    head = tmp_path / "mine.safetensors"
    backbone = load_backbone("embedded")
    torch.manual_seed(0)
    save_head(head, METHODS["sapa"].build({"channels": backbone.channels}), backbone)
    arguments = ["bench", str(tmp_path / "images"), "--labels", str(tmp_path / "labels"), *SMALL]
    names = ["--upsamplers", "bilinear, dysample", "--head", str(head)]
    result = CliRunner().invoke(build_app(), [*arguments, *names, "-o", str(out), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads((out / "bench.json").read_text())
    assert report == json.loads(result.stdout)
    assert report["format"] == "fmupsample-bench/1" and report["complete"]
    assert {"cpu", "torch", "threads", "commit"} <= report["machine"].keys()
    assert report["settings"]["backbone"] == backbone.name and not report["skipped"]
    rows = {row["upsampler"]: row for row in report["rows"]}
    assert set(rows) == {"backbone", "bilinear", "dysample", "mine"}
    for row in rows.values():
        assert row.keys() == KEYS and row["size"] == 56 and row["cells"] == [4, 4]
    for name in ("bilinear", "dysample", "mine"):
        low, high = rows[name]["quartiles_s"]
        assert 0 < low <= rows[name]["median_s"] <= high and rows[name]["reason"] is None
        assert rows[name]["output_bytes"] == 4 * backbone.channels * 56 * 56
        assert rows[name]["peak_bytes"] > 0 and rows[name]["of_backbone"] > 0
    weights = {name: rows[name]["weights"] for name in ("bilinear", "dysample", "mine")}
    assert weights == {"bilinear": "none", "dysample": "random", "mine": "trained"}
    assert rows["mine"]["method"] == "sapa" and rows["mine"]["parameters"] > 10_000

    quality = {row["upsampler"]: row for row in report["quality"]["rows"]}
    assert (report["quality"]["fitted_on"], report["quality"]["judged_on"]) == (4, 2)
    assert "trained head" in quality["dysample"]["reason"]
    for name in ("bilinear", "mine"):
        assert 0 < quality[name]["fitted"]["miou"] <= 1
    page = (out / "bench.md").read_text()
    assert "| mine | " in page and "## Probe quality" in page and "random parameters" in page
    pytest.importorskip("matplotlib")
    with Image.open(out / "bench.png") as picture:
        assert picture.format == "PNG" and picture.width > 800


def test_the_tables_are_for_people(capsys):
    names = ("--upsamplers", "nearest", "--no-memory", "--quiet")
    assert main(["bench", *SMALL, *names]) == 0
    said = capsys.readouterr()
    assert "4x4 cells to 56x56 pixels" in said.out and "x backbone" in said.out
    assert said.err == ""


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--sizes", "56,large"], 2, "--sizes '56,large' is not understood"),
        (["--sizes", "8"], 2, "size 8 is not possible"),
        (["--sizes", "56,56"], 2, "each once"),
        (["--rounds", "0"], 2, "--rounds"),
        (["--upsamplers", "sorcery"], 2, "'sorcery' is no upsampler: there are nearest"),
        (["--upsamplers", "jbu,jbu"], 2, "two upsamplers are called jbu"),
        (["--upsamplers", ","], 2, "nothing to measure"),
        (["--head", "none.safetensors"], 1, "there is no head file none.safetensors"),
        (["no-such-folder"], 2, "no-such-folder"),
        (["--labels", "x"], 2, "--labels needs one folder of pictures"),
        (["a", "--labels", "x"], 2, "the folder of pictures a does not exist"),
        (["--backbone", "no-such-model"], 1, "no-such-model"),
        (["--device", "tpu"], 2, "device 'tpu' is unknown"),
    ],
)
def test_bad_inputs_are_one_sentence(arguments, code, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "-o", "out", *arguments]) == code
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not Path("out/bench.json").exists()


def test_an_output_that_cannot_be_is_said_before_measuring(tmp_path, capsys):
    taken = tmp_path / "file"
    taken.write_text("mine")
    assert main(["bench", *SMALL, "-o", str(taken)]) == 1
    assert "cannot be written" in capsys.readouterr().err and taken.read_text() == "mine"


def test_an_interruption_keeps_what_was_measured(tmp_path, capsys, monkeypatch):
    def interrupted(runners, rounds, *, kept, **_):
        kept |= {"backbone": [2.0, 2.0], "nearest": [1.0, 3.0], "bilinear": []}
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "time_cases", interrupted)
    arguments = ["--upsamplers", "nearest,bilinear", "-o", str(tmp_path)]
    assert main(["bench", *SMALL, *arguments]) == 130
    report = json.loads((tmp_path / "bench.json").read_text())
    rows = {row["upsampler"]: row for row in report["rows"]}
    assert not report["complete"]
    assert (rows["nearest"]["median_s"], rows["nearest"]["of_backbone"]) == (2.0, 1.0)
    assert rows["bilinear"]["median_s"] is None and rows["bilinear"]["reason"] == "interrupted"
    assert "interrupted" in (tmp_path / "bench.md").read_text()
    assert "interrupted" in capsys.readouterr().err


def test_what_does_not_fit_is_a_row(capsys, monkeypatch):
    monkeypatch.setattr(run, "available_memory", lambda device: 1000)
    assert main(["bench", *SMALL, "--upsamplers", "nearest,carafe", "--json", "-q"]) == 0
    rows = {row["upsampler"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert "0.0 GB that are free" in rows["nearest"]["reason"]
    assert rows["carafe"]["parameters"] > 0 and rows["carafe"]["median_s"] is None
    assert rows["backbone"]["median_s"] > 0


def test_a_size_the_backbone_does_not_take_is_said(capsys, monkeypatch):
    def load(name, image_size=None, **_):
        backbone = load_backbone(name)
        if image_size is not None and image_size != (56, 56):
            raise UsageError("built for 56 only")
        backbone.fixed_size = (56, 56)
        return backbone

    monkeypatch.setattr("fmupsample.backbones.load_backbone", load)
    arguments = ["--device", "cpu", "--sizes", "84", "--upsamplers", "nearest"]
    assert main(["bench", *arguments]) == 1
    assert "84 px: built for 56 only" in " ".join(capsys.readouterr().err.split())


def test_methods_and_costs():
    backbone = load_backbone("embedded")
    methods = {m.name: m for m in choose(backbone)}
    assert methods["bilateral-cells"].weights == "trained"  # the shipped head
    assert methods["sapa"].weights == "random" and methods["jbu"].weights == "none"
    first, again = (methods["carafe"].build().state_dict() for _ in range(2))
    assert all(torch.equal(first[k], again[k]) for k in first)
    for name in ("bilinear", "resfu", "carafe"):
        upsampler = methods[name].build()
        assert upsampler.cost(backbone.channels, (4, 4), (56, 56)).macs > 0


def test_a_checkpoint_of_the_authors_has_a_row(tmp_path):
    path = tmp_path / "theirs.pth"
    torch.save(anyup.random_state(), path)
    _, method = choose(load_backbone("embedded"), ["bilinear"], [path])
    assert (method.name, method.row.name, method.weights) == ("theirs", "anyup", "trained")
    frequencies = method.build().state_dict()["rotation.frequencies"]
    assert torch.equal(frequencies, anyup.random_state()["rope.freqs"])


def test_pictures_are_drawn_where_there_are_none(monkeypatch, tmp_path):
    monkeypatch.setattr(pictures, "_EXAMPLES", tmp_path / "none")
    assert pictures.default_pictures() == []
    picture = pictures.drawn_picture(64)
    assert picture.shape == (64, 64, 3) and picture.std() > 20
    assert np.array_equal(picture, pictures.drawn_picture(64))


def report_of(*rows: dict) -> BenchReport:
    settings = {"sizes": [56, 112], "channels": 4, "backbone": "toy"}
    machine = {"cpu": "a CPU", "threads": 2, "torch": "2.0", "gpu": None}
    missing = dict.fromkeys(KEYS) | {"pixels": [56, 56], "cells": [4, 4], "weights": "none"}
    return BenchReport(machine, "cpu", "torch", settings, [missing | row for row in rows])


FAILED = {"size": 56, "upsampler": "big", "reason": "out of memory " * 9, "parameters": 0}
TIMED = {"size": 112, "upsampler": "b", "median_s": 1e-4, "quartiles_s": [1e-4, 1e-4]}


def test_the_chart_bears_whatever_was_measured():
    pytest.importorskip("matplotlib")
    assert chart.draw(report_of()) is None
    report = report_of(FAILED, TIMED, TIMED | {"upsampler": "a", "median_s": 3e-5, "macs": 0})
    for one in (report_of(FAILED), report):
        with Image.open(io.BytesIO(chart.draw(one))) as picture:
            assert picture.format == "PNG" and picture.height > 100
    assert chart._order(report) == ["a", "b", "big"]


@pytest.mark.parametrize("values", [[1.0], [1e-6, 10.0], [3.0, 3.1], [0.0], [0.0, 5e9]])
def test_axes_hold_their_values(values):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    ax = figure.subplots()
    panel = chart._Panel("costs", "s", {"56 px": dict(zip("ab", values, strict=False))}, {})
    chart._draw_panel(ax, panel, "ab")
    low, high = ax.get_xlim()
    assert all(low < value < high for value in values)


def test_settings_of_the_current_folder_do_not_change_the_chart(tmp_path):
    """matplotlib reads a matplotlibrc of the current folder, which may ask for other programs."""
    mpl = pytest.importorskip("matplotlib")
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\naxes.facecolor: red\n")
    plain = chart.draw(report_of(TIMED))
    with mpl.rc_context(fname=tmp_path / "matplotlibrc"):
        assert chart.draw(report_of(TIMED)) == plain


def test_without_matplotlib_the_rest_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = ["bench", *SMALL, "--upsamplers", "nearest", "--no-memory", "-o", str(tmp_path)]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "pip install 'fmupsample[plot]'" in said.err
    assert "bench.json, bench.md" in said.out and "bench.png" not in said.out
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.md"}


def test_rows_of_a_table():
    rows = tables.cost_rows(report_of(TIMED, TIMED | {"upsampler": "a", "median_s": 3e-5}), 112)
    assert [row[0] for row in rows] == ["a", "b"] and rows[0][1] == "0.03"


def test_labelled_pictures_are_spread_and_split():
    assert spread(range(5), 9) == [0, 1, 2, 3, 4]
    assert spread(range(100), 4) == [0, 33, 66, 99]
    assert split([1, 2, 3, 4, 5, 6, 7]) == ([1, 2, 4, 5, 7], [3, 6])
    with pytest.raises(UsageError, match="there are 2"):
        split([1, 2])


class Opaque(Upsampler):
    """Bilinear interpolation that does not let anyone look inside."""

    name = "opaque"
    linear_in_value = False

    def forward(self, x, guidance=None, *, size=None):
        return torch.nn.functional.interpolate(x, self.check(x, guidance, size), mode="bilinear")


@pytest.mark.parametrize("fit", ["resize", "pad"])
def test_probes_do_not_see_whether_a_method_is_linear(tmp_path, fit):
    dataset = open_dataset(labelled(tmp_path) / "images", tmp_path / "labels")
    table = survey(dataset).table
    pipeline = Pipeline(ToyBackbone(), image_size=ImageSize(short=60), fit=fit)
    comparison = Comparison(pipeline, dataset.pairs[:4], dataset.pairs[4:], table, epochs=8)
    rows = [comparison.measure(up) for up in (Bilinear(), Opaque(), ToyUpsampler())]
    for probe in ("preserved", "fitted"):
        same = [row[probe] for row in rows[:2]]
        assert same[0]["miou"] == pytest.approx(same[1]["miou"], abs=2e-3)
        assert same[0]["boundary_f"] == pytest.approx(same[1]["boundary_f"], abs=1e-2)
    # Edges are where colours change, and that upsampler looks at colours.
    assert rows[2]["fitted"]["band_miou"] > rows[0]["fitted"]["band_miou"]


@pytest.mark.parametrize("fit", ["resize", "pad"])
def test_features_at_pixels_are_those_of_the_map(tmp_path, fit):
    sources = find_images([labelled(tmp_path, 1) / "images"])
    for upsampler in (ToyUpsampler(), Opaque(), Bilinear()):
        pipeline = Pipeline(ToyBackbone(), upsampler, image_size=ImageSize(short=60), fit=fit)
        (item,) = pipeline.items(sources, on_error=None)
        whole = pipeline.upsample(item)
        pixels = torch.tensor([0, 5, whole.shape[2], whole[0].numel() - 1])
        found = features_at(pipeline, item, pixels)
        torch.testing.assert_close(found, whole.flatten(1)[:, pixels].T)


def test_a_process_apart_imports_nothing_of_the_current_folder_and_ends_with_its_parent(tmp_path):
    (tmp_path / "timm.py").write_text("open('imported', 'w').close()")
    code = (
        "import functools, os, signal\n"
        "from fmupsample.bench.measuring import Apart\n"
        "if __name__ == '__main__':\n"
        "    print(Apart(functools.partial, len)._pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/run.py").write_text(code)
    ran = subprocess.run(
        [sys.executable, tmp_path / "elsewhere/run.py"],
        cwd=tmp_path,
        timeout=120,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert not (tmp_path / "imported").exists()
    process = Path("/proc") / str(int(ran.stdout))
    for _ in range(300):
        if not process.exists():
            break
        time.sleep(0.1)
    assert not process.exists()
