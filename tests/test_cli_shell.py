"""The command line's frame: help, version, exit codes, and what is said when something fails."""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import typer

from fmupsample._version import __version__
from fmupsample.errors import BackboneError, ImageError, UsageError
from fmupsample.progress import Progress
from fmupsample.threads import compute_alone
from fmupsample.waiting import spin_briefly
from fmupsample.wording import human_bytes
from fmupsample_cli.errors import run
from fmupsample_cli.main import main
from fmupsample_cli.progress import RichProgress
from fmupsample_cli.report import print_summary

NARROW = {"COLUMNS": "100", "TERM": "dumb"}


def started(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True, text=True, timeout=60, env=os.environ | NARROW, check=False,
    )  # fmt: skip


def failing(error: BaseException):
    """Run an application whose only command raises ``error``."""
    app = typer.Typer()

    @app.command()
    def fail() -> None:
        raise error

    return run(app, [])


def test_threads_beside_the_models_compute_alone():
    """And change nothing for others: those that are there, and those to come."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ready = threading.Barrier(3)

        def threads() -> int:
            ready.wait()
            return torch.get_num_threads()

        with ThreadPoolExecutor(3, initializer=compute_alone) as pool:
            assert [f.result() for f in [pool.submit(threads) for _ in range(3)]] == [1, 1, 1]
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not the GNU C library")
def test_freed_memory_is_kept_by_the_command():
    """Taking and freeing the same megabytes again costs no new pages then."""
    code = """
import ctypes, resource
from fmupsample.heap import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        block = libc.malloc(24 << 20)
        ctypes.memset(block, 1, 24 << 20)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
libc.mallopt(-3, 1 << 17)  # where glibc begins: larger blocks are the system's
first = faults()
assert keep_freed_memory()
faults()
print(first, faults())
"""
    result = started("-c", code)
    assert result.returncode == 0, result.stderr
    first, then = map(int, result.stdout.split())
    assert first > 20 * 10 and then < first / 10, (first, then)


def test_help_lists_the_commands_and_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from fmupsample_cli.main import main\n"
        "status = main(['--help'])\n"
        "heavy = {'torch', 'timm', 'numpy', 'cv2', 'PIL', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else status)\n"
    )
    result = started("-c", code)
    assert result.returncode == 0, result.stderr
    for word in (
        "visualize",
        "extract",
        "train",
        "bench",
        "models",
        "build",
        "doctor",
        "Features",
        "Tools",
    ):
        assert word in result.stdout


def test_python_dash_m_is_the_command():
    result = started("-m", "fmupsample", "--version")
    assert (result.returncode, result.stdout) == (0, f"fmupsample {__version__}\n")


@pytest.mark.parametrize(
    "command", ["visualize", "extract", "train", "export", "bench", "models", "build", "doctor"]
)
def test_every_command_has_a_help_page(command, capsys):
    assert main([command, "--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_no_arguments_show_the_help_and_nothing_on_stderr(capsys):
    assert main([]) == 2
    captured = capsys.readouterr()
    assert "Usage" in captured.out and captured.err == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["extrct"], "No such command 'extrct'"),
        (["models", "--jsn"], "No such option: --jsn"),
        (["extract", "x.png"], "Missing option '--output'"),
        (["extract", "x.png", "-o", "out", "--precision", "fp8"], "fp8"),
    ],
)
def test_usage_errors_are_one_line_and_exit_code_2(arguments, said, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert said in err and "--help`)" in err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("--a and --b exclude each other"), 2, "error: --a and --b exclude each other"),
        (BackboneError("no such model"), 1, "error: no such model"),
        (ImageError("broken"), 1, "error: broken"),
        (OSError(errno.ENOSPC, "No space", "out/a.npy"), 1, "out/a.npy: no space left on the disk"),
        (PermissionError(errno.EACCES, "x", "out"), 1, "error: out: permission denied"),
        (MemoryError(), 1, "out of memory; use a smaller --image-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory"),
        (RuntimeError("I/O error: No space left on device"), 1, "no space left on the disk"),
        (ZeroDivisionError("division by zero"), 1, "unexpected ZeroDivisionError: division by"),
        (typer.Exit(3), 3, ""),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_a_sentence_and_a_code(error, code, said, capsys):
    assert failing(error) == code
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_debugging_shows_the_traceback(monkeypatch, capsys):
    monkeypatch.setenv("FMUPSAMPLE_DEBUG", "1")
    assert failing(BackboneError("no such model")) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("error: no such model\n")


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m fmupsample models --json | head -n 1"
    result = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.stdout, result.stderr) == ("[\n", "")


def test_summaries_go_to_stdout_as_table_or_json(capsys):
    payload = {"done": 3, "rate": float("nan"), "sizes": [(1, 2)]}
    print_summary("extract", {"done": 3, "size": 123456}, as_json=False, payload=payload)
    out = capsys.readouterr().out
    assert "extract" in out and "123,456" in out
    print_summary("extract", {}, as_json=True, payload=payload)
    assert json.loads(capsys.readouterr().out) == {"done": 3, "rate": None, "sizes": [[1, 2]]}


def test_sizes_for_people():
    assert [human_bytes(n) for n in (5, 1500, 88_400_000, 154e6)] == [
        "5 B", "1.5 kB", "88.4 MB", "154 MB",
    ]  # fmt: skip


def test_progress_is_plain_lines_when_not_a_terminal(capsys):
    with RichProgress(interval=0.0) as bar:
        progress: Progress = bar
        progress.start(3, "upsampling")
        progress.advance(2)
        progress.warn("one picture is damaged")
        progress.advance()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "upsampling: 3/3 pictures" in captured.err
    assert "warning: one picture is damaged" in captured.err


def test_quiet_progress_still_warns(capsys):
    with RichProgress(quiet=True, interval=0.0) as progress:
        progress.start(1, "upsampling")
        progress.advance()
        progress.warn("careful")
    assert capsys.readouterr().err == "warning: careful\n"


def test_waiting_threads_sleep_soon_unless_the_user_said_how(monkeypatch):
    for given, expected in (
        ({}, "3000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ):
        for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        spin_briefly()
        assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_the_command_says_so_before_torch_is_there():
    code = (
        "import os, sys; sys.argv[1:] = ['--version']; from fmupsample_cli.main import main\n"
        "try: main()\nfinally: assert os.environ['GOMP_SPINCOUNT'] == '3000', 'not set'\n"
        "assert 'torch' not in sys.modules"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    subprocess.run([sys.executable, "-c", code], env=clean, check=True, timeout=60)
