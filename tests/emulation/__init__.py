"""The CUDA kernels compiled for the CPU, see ``cuda_on_cpu.h``."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "fmupsample" / "ops" / "csrc"
NAMESPACE = "fmupsample_emulated"


def build(folder: Path) -> Path:
    """Compile the library into ``folder``, unless it is there already; about 20 s."""
    torch_home = Path(torch.__file__).parent
    files = sorted([*SOURCES.iterdir(), *HERE.glob("*.h"), *HERE.glob("*.cpp")])
    digest = hashlib.sha256(torch.__version__.encode())
    for file in files:
        digest.update(file.read_bytes())
    library = folder / f"emulated-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        include = torch_home / "include"
        command = [
            *(shutil.which("g++") or "g++", "-std=c++20", "-O1", "-fPIC", "-shared"),
            "-DFMUPSAMPLE_EMULATED",
            *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
            *(f"-I{HERE}", f"-I{SOURCES}"),
            *("-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")),
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
            str(HERE / "emulated.cpp"),
            *("-o", str(library.with_suffix(".part")), f"-L{torch_home / 'lib'}"),
            *("-ltorch_cpu", "-lc10"),
        ]
        subprocess.run(command, check=True)
        library.with_suffix(".part").rename(library)
    return library


class Emulation:
    """The loaded library."""

    def __init__(self, library: Path):
        torch.ops.load_library(library)
        self._library = ctypes.CDLL(str(library))

    def set_order(self, order: int) -> None:
        """Threads run ascending (0), descending (1), or shuffled with that seed."""
        self._library.fmupsample_emulation_order(order)

    def set_capability(self, capability: int) -> None:
        """Compute capability that the kernels are told, as 10 * major + minor."""
        self._library.fmupsample_emulation_capability(capability)
