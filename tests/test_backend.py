"""Which implementation computes: auto, forced, not to be had. GPUs are pretended."""

from __future__ import annotations

import subprocess
import sys
import threading
import types
import warnings
from pathlib import Path

import pytest
import torch

from fmupsample.errors import ExtensionError, UsageError
from fmupsample.ops import backend, plain
from fmupsample.ops.building import extension
from fmupsample.ops.building.cache import Library

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


class FakeExtension:
    """Loads, or fails to; counts how often it is asked."""

    def __init__(self, error: ExtensionError | None = None) -> None:
        self.error, self.calls = error, 0

    def load(self, progress=None) -> Library:
        self.calls += 1
        if progress:
            progress("compiling", 1.0)
        if self.error:
            raise self.error
        return Library(Path("lib.so"), ("sm_80",), "key", torch.__version__, 1.0, 1)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As in a new process; afterwards as it was."""
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.setattr(backend, "_warned", False)
    backend.set_backend(None)
    yield
    backend.set_backend(None)


@pytest.fixture
def compiled(monkeypatch) -> types.ModuleType:
    """The module that calls the extension, on a machine with one GPU of capability 8.6."""
    module = types.ModuleType("fmupsample.ops.cuda")
    monkeypatch.setitem(sys.modules, "fmupsample.ops.cuda", module)
    monkeypatch.setattr(extension, "EXTENSION", FakeExtension())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return module


@pytest.fixture
def failing(compiled, monkeypatch) -> FakeExtension:
    fake = FakeExtension(ExtensionError("nvcc, the CUDA compiler, was not found", "nvcc"))
    monkeypatch.setattr(extension, "EXTENSION", fake)
    return fake


def test_a_cpu_is_plain_pytorch_and_looks_for_nothing() -> None:
    """In a process of its own: what is imported, what is touched, what is started."""
    code = (
        "import subprocess, sys, torch\n"
        "subprocess.Popen = None\n"
        "from fmupsample.ops import backend, plain, reassemble\n"
        "assert backend.implementation(torch.device('cpu')) is plain\n"
        "assert not backend.compiled(torch.device('cpu'))\n"
        "reassemble(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 4, 4))\n"
        "names = ('torch.utils.cpp_extension', 'fmupsample.ops.building.extension')\n"
        "heavy = set(names) & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_auto_takes_the_extension_on_a_gpu(compiled) -> None:
    assert backend.get_backend() == "auto"
    assert backend.implementation(GPU) is compiled and backend.compiled(GPU)
    assert backend.implementation(torch.device("cuda")) is compiled
    assert backend.implementation(CPU) is plain and not backend.compiled(CPU)
    assert extension.EXTENSION.calls == 1


def test_auto_falls_back_with_one_warning(failing) -> None:
    with pytest.warns(RuntimeWarning, match=r"plain PyTorch is used on cuda:0: .*nvcc") as caught:
        assert backend.implementation(GPU) is plain
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.implementation(GPU) is plain
        backend.set_backend("auto")
        assert backend.implementation(GPU) is plain and not backend.compiled(GPU)


def test_a_prepared_device_gives_no_warning(failing, recwarn) -> None:
    """The command line says it in its own way."""
    steps = []
    choice = backend.prepare(torch.device("cuda"), lambda *step: steps.append(step))
    assert choice.name == "torch" and choice.module is plain and "nvcc" in choice.reason
    assert steps == [("compiling", 1.0)]
    assert backend.implementation(GPU) is plain and not recwarn.list


def test_torch_does_not_ask_for_the_extension(compiled) -> None:
    backend.set_backend("torch")
    assert backend.implementation(GPU) is plain and not backend.compiled(GPU)
    assert extension.EXTENSION.calls == 0
    backend.set_backend("auto")
    assert backend.implementation(GPU) is compiled


def test_forced_works_or_says_why(compiled, monkeypatch) -> None:
    backend.set_backend("cuda")
    assert backend.implementation(GPU) is compiled
    for attempt in (lambda: backend.implementation(CPU), lambda: backend.check_backend(CPU)):
        with pytest.raises(UsageError, match="needs a CUDA device"):
            attempt()
    backend.set_backend("cuda")
    error = ExtensionError("ninja was not found", "ninja", "the.log")
    monkeypatch.setattr(extension, "EXTENSION", FakeExtension(error))
    with pytest.raises(ExtensionError, match="not available: ninja was not found") as caught:
        backend.implementation(GPU)
    assert (caught.value.kind, caught.value.log) == ("ninja", "the.log")


@pytest.mark.parametrize(
    ("capability", "said"), [((7, 0), "capability 7.0"), ((9, 0), "not compiled for 9.0")]
)
def test_a_gpu_the_library_does_not_serve(compiled, monkeypatch, capability, said) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert said in backend.prepare(GPU).reason


def test_the_environment_chooses_unless_the_program_does(compiled, monkeypatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, "torch")
    assert backend.get_backend() == "torch" and backend.implementation(GPU) is plain
    backend.set_backend("auto")
    assert backend.get_backend() == "auto" and backend.implementation(GPU) is compiled
    backend.set_backend(None)
    assert backend.implementation(GPU) is plain


def test_unknown_names_are_refused(monkeypatch) -> None:
    with pytest.raises(UsageError, match="backend 'cpu' is unknown: use auto, cuda, torch"):
        backend.set_backend("cpu")
    monkeypatch.setenv(backend.VARIABLE, "fast")
    with pytest.raises(UsageError, match="FMUPSAMPLE_BACKEND='fast'"):
        backend.implementation(CPU)


def test_many_threads_decide_once(compiled) -> None:
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(backend.implementation(GPU))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [compiled] * 8 and extension.EXTENSION.calls == 1
