"""``fmupsample build``, ``--backend`` and what ``doctor`` says of the extension."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from drawn import Blocks, PatchMeans, draw

from fmupsample.errors import ExtensionError
from fmupsample.ops import backend
from fmupsample.ops.backend import BACKENDS, Choice
from fmupsample.ops.building import compiling, extension
from fmupsample.ops.building.compiling import Tools
from fmupsample.ops.building.extension import Extension
from fmupsample_cli import loading
from fmupsample_cli.main import main
from fmupsample_cli.options import BackendName

KNOWN = [75, 80, 86, 89, 90]
USUAL = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "compute_90")
TOOLS = Tools("nvcc", "g++", "ninja")


class Compiler:
    """Writes a library without compiling, or fails; keeps what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[str, ...], int | None]] = []
        self.error: ExtensionError | None = None

    def __call__(
        self, sources, work, tools, targets, *, log, jobs, timeout, progress, output
    ) -> Path:
        self.calls.append((tuple(targets), jobs))
        progress("compiling the CUDA extension, once", 0.0)
        progress("compiling the CUDA extension, once", 1.0)
        if output:
            output("what the compilers say\n")
        if self.error:
            raise self.error
        (work / "x.so").write_text("a library")
        return work / "x.so"


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch) -> Compiler:
    """On a machine with nvcc and without a GPU; nothing is compiled or loaded."""
    fake = Compiler()
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/k.cu").write_text("")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(compiling, "required_tools", lambda cuda: TOOLS)
    monkeypatch.setattr(compiling, "known_codes", lambda nvcc: KNOWN)
    monkeypatch.setattr(extension, "capabilities", list)
    monkeypatch.setattr(compiling, "compile_library", fake)
    made = Extension(tmp_path / "csrc", tmp_path / "cache", tmp_path / "none")
    made.open = lambda library: None
    monkeypatch.setattr(extension, "EXTENSION", made)
    return fake


def test_build_says_what_it_built_where_in_how_long(compiler, tmp_path: Path, capsys) -> None:
    assert main(["build", "--jobs", "2"]) == 0
    streams = capsys.readouterr()
    assert "the CUDA extension is compiled" in streams.out and "in 0 s" in streams.out
    assert f"{tmp_path}/cache" in streams.out and "sm_75" in streams.out
    assert streams.err == "compiling the CUDA extension, once ...\n"
    assert compiler.calls == [(USUAL, 2)]
    assert main(["build"]) == 0
    assert "there already" in capsys.readouterr().out and len(compiler.calls) == 1
    assert main(["build", "--force", "--quiet"]) == 0
    assert capsys.readouterr().err == "" and len(compiler.calls) == 2


def test_build_for_what_is_asked(compiler, monkeypatch, capsys) -> None:
    def targets(*arguments: str) -> tuple[str, ...]:
        assert main(["build", "--json", *arguments]) == 0
        made = json.loads(capsys.readouterr().out)
        assert made["ok"] and made["compiled"] and Path(made["library"]).is_file()
        assert compiler.calls[-1][0] == tuple(made["targets"])
        return tuple(made["targets"])

    assert targets("--arch", "8.0,9.0+PTX") == ("sm_80", "sm_90", "compute_90")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0 8.6")
    assert targets() == ("sm_86",)
    assert targets("--arch", "all") == USUAL
    monkeypatch.setattr(extension, "capabilities", lambda: [(9, 0)])
    assert targets() == ("sm_90",)


@pytest.mark.parametrize("arch", ["6.0", "12.0", "nine", "8.0,7.0"])
def test_an_architecture_that_cannot_be(compiler, arch, capsys) -> None:
    assert main(["build", "--arch", arch]) == 2
    assert capsys.readouterr().err.startswith("error: ") and not compiler.calls


def test_build_says_why_not(compiler, capsys) -> None:
    compiler.error = ExtensionError("it does not compile: k.cu(1): error: no", "compile", "the.log")
    assert main(["build", "--verbose"]) == 1
    assert capsys.readouterr().err == (
        "what the compilers say\nerror: it does not compile: k.cu(1): error: no\n"
    )
    assert main(["build", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["ok"], said["kind"], said["log"]) == (False, "compile", "the.log")
    assert len(compiler.calls) == 2  # tried again each time
    assert main(["build", "--arch", "native"]) == 1
    assert "found none" in capsys.readouterr().err


# -- doctor ---------------------------------------------------------------------------------------


@pytest.fixture
def examine(compiler, capsys):
    """What ``doctor`` finds: ``examine()["CUDA extension"]``; every other check is left out."""
    from fmupsample_cli import doctor

    def found() -> dict[str, str]:
        return {row["what"]: row["found"] for row in doctor._extension()}

    return found


def test_doctor_on_a_machine_without_a_gpu(compiler, examine, monkeypatch) -> None:
    assert examine()["CUDA extension"] == "not usable: no CUDA device"
    assert {"nvcc", "c++", "ninja"} <= set(examine())
    assert main(["build"]) == 0
    assert examine()["CUDA extension"].startswith("compiled, not used: no CUDA device; ")
    monkeypatch.setenv("FMUPSAMPLE_BACKEND", "torch")
    assert examine()["backend"] == "torch, by FMUPSAMPLE_BACKEND"


def test_doctor_on_a_machine_with_a_gpu(compiler, examine, monkeypatch) -> None:
    monkeypatch.setattr(extension, "capabilities", lambda: [(8, 6)])
    assert examine()["CUDA extension"].startswith("would be compiled at the first use")
    compiler.error = ExtensionError("k.cu(1): error: no", "compile")
    assert main(["build"]) == 1
    assert "failed, plain PyTorch is used: k.cu(1): error: no" in examine()["CUDA extension"]
    compiler.error = None
    assert main(["build"]) == 0
    assert main(["build", "--arch", "8.0"]) == 0
    # The library is pretended: that it is loaded is told, and that its results are not there.
    assert examine()["CUDA extension"].startswith("loaded: ")
    assert "does not run" in examine()["extension's results"]


def test_doctor_names_what_is_missing(compiler, examine, monkeypatch) -> None:
    def missing(cuda):
        raise ExtensionError("nvcc, the CUDA compiler, was not found", "nvcc")

    monkeypatch.setattr(extension, "capabilities", lambda: [(8, 6)])
    monkeypatch.setattr(compiling, "required_tools", missing)
    assert "not usable, plain PyTorch is used: nvcc" in examine()["CUDA extension"]


# -- extract and visualize ------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr(loading, "load_models", lambda *a, **k: (PatchMeans(), Blocks()))
    monkeypatch.delenv("FMUPSAMPLE_BACKEND", raising=False)
    draw(tmp_path / "photos/a.png")
    yield tmp_path / "photos"
    backend.set_backend(None)


def test_the_words_of_the_option_are_those_of_the_library() -> None:
    assert tuple(BackendName) == BACKENDS


@pytest.mark.parametrize("command", ["extract", "visualize"])
def test_the_summary_names_the_backend(photos: Path, tmp_path: Path, command, capsys) -> None:
    arguments = [command, str(photos), "-o", str(tmp_path / "out"), "--device", "cpu"]
    assert main(arguments) == 0
    assert "torch, plain PyTorch" in capsys.readouterr().out
    assert main([*arguments, "--json", "--backend", "torch"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["backend"], summary["backend_reason"]) == ("torch", None)


@pytest.mark.parametrize("command", ["extract", "visualize"])
def test_forcing_the_extension_on_a_cpu_is_a_usage_error(
    photos: Path, tmp_path: Path, command, monkeypatch, capsys
) -> None:
    arguments = [command, str(photos), "-o", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*arguments, "--backend", "cuda"]) == 2
    assert "error: backend cuda needs a CUDA device" in capsys.readouterr().err
    monkeypatch.setenv("FMUPSAMPLE_BACKEND", "cuda")
    assert main(arguments) == 2
    monkeypatch.setenv("FMUPSAMPLE_BACKEND", "fast")
    assert main(arguments) == 2
    assert not (tmp_path / "out").exists()


def test_why_plain_pytorch_is_used_is_said_once(
    photos: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    choice = Choice("torch", backend.plain, "the CUDA extension is not available: no nvcc")
    monkeypatch.setattr(backend, "prepare", lambda device, progress=None: choice)
    arguments = ["extract", str(photos), "-o", str(tmp_path / "out"), "--device", "cpu"]
    assert main(arguments) == 0
    streams = capsys.readouterr()
    assert streams.err.count("no nvcc") == 1 and "(the CUDA extension is" in streams.out
    # An upsampler that has no use for the extension does not ask for it.
    monkeypatch.setattr(Blocks, "uses_ops", False)
    assert main([*arguments, "--overwrite"]) == 0
    streams = capsys.readouterr()
    assert "no nvcc" not in streams.err + streams.out
