"""What files, lists and terminals of others lead to: a sentence, and nothing else."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_training import draw_pictures, options, run
from toy import ToyBackbone

from fmupsample.atomic import temporary_for
from fmupsample.errors import HeadError, ImageError, OutputError, UsageError
from fmupsample.folders import cache_folder
from fmupsample.images import find, find_images
from fmupsample.labels.classes import ClassTable
from fmupsample.labels.depth import read_depth
from fmupsample.labels.parsing import parse_classes, parse_ignore
from fmupsample.labels.values import read_values
from fmupsample.probing.points import read_clicks
from fmupsample.runs.lock import FolderLock
from fmupsample.training import fit
from fmupsample.training.report import Log
from fmupsample.upsamplers import BilateralCells, BilateralCellsConfig, load_head, save_head
from fmupsample.upsamplers.affinity.config import AffinityConfig
from fmupsample_cli.errors import run as run_app

NESTED = "[" * 100_000


# -- training that goes on -------------------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path: Path) -> tuple[Path, Path]:
    """Pictures, and the head of a run with a checkpoint."""
    pictures, output = draw_pictures(tmp_path / "pictures"), tmp_path / "head.safetensors"
    run(pictures, output)
    return pictures, output


def test_pictures_of_another_content_are_other_pictures(stopped) -> None:
    pictures, output = stopped
    path = sorted(pictures.iterdir())[0]
    with Image.open(path) as image:
        changed = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    changed.save(path)
    with pytest.raises(UsageError, match="other pictures"):
        run(pictures, output, resume=True)


def _without(key: str):
    return lambda whole: {k: v for k, v in whole.items() if k != key}


@pytest.mark.parametrize(
    "damage",
    [
        b"", b"\x80\x02.", b"no", _without("config"), _without("pictures"), _without("state"),
        lambda whole: {**whole, "config": NESTED}, lambda whole: {**whole, "state": {"step": 3}},
        lambda whole: {**whole, "state": 7},
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_one_sentence(damage, stopped) -> None:
    pictures, output = stopped
    path = output.with_name("head.safetensors.train") / "checkpoint.pt"
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    else:
        torch.save(damage(torch.load(path, weights_only=True)), path)
    with pytest.raises(UsageError) as caught:
        run(pictures, output, resume=True)
    assert "is damaged; begin again" in str(caught.value) or "not a checkpoint" in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_two_runs_do_not_train_one_head(stopped, tmp_path) -> None:
    pictures, output = stopped
    with (
        FolderLock(output.with_name("head.safetensors.train")),
        pytest.raises(OutputError, match="another run is writing"),
    ):
        run(pictures, output, options(steps=2), overwrite=True, work=tmp_path / "elsewhere")


def test_a_second_fit_waits_for_the_first(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FMUPSAMPLE_CACHE", str(tmp_path))
    path, said, results = fit.fitted_head_path(ToyBackbone(), "bilateral-cells"), [], []
    waiting = threading.Event()

    def say(message: str) -> None:
        said.append(message)
        waiting.set()

    def second() -> None:
        results.append(fit.fit_head(ToyBackbone(), [], device=torch.device("cpu"), say=say))

    with FolderLock(path.with_suffix(".fitting")):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(10) and "waiting for it" in said[0]
        path.write_bytes(b"the head of the first")
    thread.join(10)
    assert results == [None] and len(said) == 1
    assert not path.with_suffix(".fitting").exists()


def test_a_log_of_other_bytes_is_read(tmp_path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'\xff\xfe\n{"step": 3}\n' + NESTED.encode() + b'\n{"step": 4')
    assert Log(path).read() == [{"step": 3}]


# -- names and lists -------------------------------------------------------------------------------


def test_processes_of_the_same_number_write_different_files(tmp_path) -> None:
    """As in two containers that share a folder."""
    code = (
        "import os, pathlib; os.getpid = lambda: 7; from fmupsample.atomic import temporary_for;"
        "print(temporary_for(pathlib.Path('x')))"
    )
    names = {subprocess.check_output([sys.executable, "-c", code]) for _ in range(2)}
    assert len(names) == 2
    assert len(temporary_for(Path("x")).name) < 60


def test_nobody_s_home(monkeypatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    for name in ("FMUPSAMPLE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder().is_absolute()
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder().is_absolute()


@pytest.mark.parametrize("name", ["a\x1cb.png", "a\x85b.png", "ü.png"])
def test_lists_are_cut_at_line_breaks_alone(name, tmp_path, monkeypatch) -> None:
    """From a file and from standard input, with and without a byte order mark, in any locale."""
    (tmp_path / name).write_bytes(b"")
    content = b"\xef\xbb\xbf" + name.encode() + b"\r\n"
    (tmp_path / "list").write_bytes(content)
    assert [s.path.name for s in find_images([], list_file=tmp_path / "list")] == [name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), "ascii"))
    assert [s.path.name for s in find_images([], list_file="-")] == [name]


def test_a_list_without_end(monkeypatch) -> None:
    monkeypatch.setattr(find, "_LONGEST_LIST", 1 << 20)
    with pytest.raises(UsageError, match="is longer than 1 MB"):
        find_images([], list_file="/dev/zero")


# -- the terminal ----------------------------------------------------------------------------------


def started(code: str, redirected: str, **environment: str) -> subprocess.CompletedProcess:
    command = f'"{sys.executable}" -c "$CODE" {redirected}'
    return subprocess.run(
        command, shell=True, capture_output=True, check=False,
        env=os.environ | {"CODE": code} | environment,
    )  # fmt: skip


SAY = (
    "import sys, typer; from fmupsample_cli.errors import run; app = typer.Typer();"
    "from fmupsample_cli.report import print_json;"
    "app.command()(lambda: print_json({'a': 'ü\\u20ac'})); sys.exit(run(app, []))"
)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_standard_output_that_is_full_or_closed() -> None:
    full = started(SAY, ">/dev/full")
    assert full.returncode == 1
    assert full.stderr.startswith(b"error: ") and full.stderr.count(b"\n") == 1
    assert b"space left" in full.stderr.lower()
    closed = started(SAY, ">&-")
    assert (closed.returncode, closed.stderr) == (0, b"")


def test_a_terminal_of_few_characters() -> None:
    done = started(SAY, "", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and json.loads(done.stdout) == {"a": "ü€"}


def test_control_characters_never_reach_the_terminal(capsys) -> None:
    import typer

    from fmupsample_cli.progress import note, warn
    from fmupsample_cli.report import print_summary

    app = typer.Typer()

    @app.command()
    def fail() -> None:
        raise HeadError("a head of '\x1b]0;mine\x07\r\x9b31m'")

    assert run_app(app, []) == 1
    note("note \x1b[2J")
    warn("warning \x1b[2J")
    print_summary("title \x1b[2J", {"card": "\x1b[2J"}, as_json=False, payload={})
    said = capsys.readouterr()
    assert "\\x1b]0;mine\\x07\\r\\x9b31m" in said.err and "\\x1b[2J" in said.out
    assert not set("\x1b\x07\r\x9b") & set(said.err + said.out)


# -- numbers, arrays and configurations ------------------------------------------------------------


@pytest.mark.parametrize("header", ["((((", "(" * 3000, "{'descr': '<f4', 'shape': (1,"])
def test_headers_of_arrays_that_cannot_be(header, tmp_path) -> None:
    path, text = tmp_path / "x.npy", header.encode() + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    with pytest.raises(ImageError, match="cannot be read"):
        read_values(path)
    with pytest.raises(ImageError, match="cannot be read"):
        read_depth(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("deep.json", NESTED), ("huge.json", '[{"name": "a", "value": 1e999}, "b"]'),
        ("long.csv", "name,value\n" + "a" * 200_000 + ",1\nb,2\n"),
    ],
)  # fmt: skip
def test_class_files_that_cannot_be(name, text, tmp_path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match="is not understood"):
        parse_classes(str(tmp_path / name))


@pytest.mark.parametrize("word", ["²", "٣", "9" * 30, "16777216"])
def test_ignored_values_that_cannot_be(word) -> None:
    with pytest.raises(UsageError, match="is not understood"):
        parse_ignore([word])


def test_values_of_classes_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="no value of a label file"):
        ClassTable(("a", "b"), (0, 10**30), ((0, 0, 0), (1, 1, 1)))


def test_clicks_of_a_class_beyond_all(tmp_path) -> None:
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "a.png")
    points = [{"image": "a.png", "x": 1, "y": 1, "class": n} for n in (0, 10**9)]
    (tmp_path / "points.json").write_text(json.dumps(points))
    with pytest.raises(UsageError, match="class 1000000000 is too large"):
        read_clicks(tmp_path / "points.json", find_images([tmp_path]))


@pytest.mark.parametrize(
    "change",
    [
        {"guided_radius": -5}, {"guided_radius": 1.5}, {"guided_eps": float("nan")},
        {"sigma_range": float("inf")}, {"taper": 1}, {"kernel_size": True}, {"keys": ["learned"]},
    ],
)  # fmt: skip
def test_configurations_of_heads_that_cannot_be(change, tmp_path, monkeypatch) -> None:
    config = BilateralCellsConfig(embedding=8, norm_groups=2)
    written = {**config.to_dict(), **change}
    monkeypatch.setattr(BilateralCellsConfig, "to_dict", lambda _: written)
    save_head(tmp_path / "h.safetensors", BilateralCells(config), None)
    with pytest.raises(HeadError, match=f"is unusable: .*{next(iter(change))}"):
        load_head(tmp_path / "h.safetensors")


def test_whole_numbers_serve_as_floats() -> None:
    assert AffinityConfig.from_dict({"sigma_space": 1}).sigma_space == 1
