"""The compilers of this machine, as far as compiling the CUDA extension needs them.

``nvcc`` on the path may be a script that starts the real one elsewhere, or lie in a folder that
holds no headers. So nvcc itself is asked where it is and where its headers and libraries are
(``nvcc --dryrun`` prints both), and nothing is guessed from its path.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fmupsample.errors import ExtensionError

# Environment that decides what is found.
_WHERE = ("PATH", "CUDA_HOME", "CUDA_PATH", "CXX")


@dataclass(frozen=True)
class Tool:
    """A program and what it says of its version. ``command`` may be several words."""

    command: tuple[str, ...]
    version: str

    def __str__(self) -> str:
        return f"{self.version}, {shlex.join(self.command)}"


@dataclass(frozen=True)
class Nvcc(Tool):
    """nvcc, the real one.

    Attributes:
        targets: what it can compile for: ``sm_80``, ..., ``compute_80``, ...
        include, libraries: its own folders.
    """

    targets: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()

    @property
    def major(self) -> int:
        return int(self.version.split(".")[0])


@dataclass(frozen=True)
class Toolchain:
    """All that a build needs; ``nvcc`` is ``None`` where there is no CUDA source."""

    cxx: Tool
    ninja: Tool
    nvcc: Nvcc | None

    @property
    def identity(self) -> dict[str, str]:
        """By which a later process sees that it has the same tools."""
        tools = {"cxx": self.cxx, "ninja": self.ninja, "nvcc": self.nvcc}
        return {name: str(tool) for name, tool in tools.items() if tool is not None}


def find_toolchain(torch_cuda: str | None) -> Toolchain:
    """The tools for an extension of a PyTorch made for CUDA ``torch_cuda`` (``None``: no CUDA).

    Raises:
        ExtensionError: something is missing, or nvcc does not fit PyTorch.
    """
    nvcc = None
    if torch_cuda is not None:
        nvcc = find_nvcc(torch_cuda)
        if nvcc is None:
            raise ExtensionError("nvcc, the CUDA compiler, was not found", "nvcc")
        if nvcc.major != int(torch_cuda.split(".")[0]):
            raise ExtensionError(
                f"nvcc is of CUDA {nvcc.version} and PyTorch of CUDA {torch_cuda}: "
                "their major versions must be the same",
                "version",
            )
    cxx = find_cxx()
    if cxx is None:
        raise ExtensionError("no C++ compiler was found (c++, g++, clang++ or $CXX)", "compiler")
    ninja = find_ninja()
    if ninja is None:
        raise ExtensionError("ninja was not found; `pip install ninja` brings it", "ninja")
    return Toolchain(cxx, ninja, nvcc)


def find_cxx() -> Tool | None:
    """The C++ compiler: ``$CXX``, which may be several words, or the usual names."""
    given = shlex.split(os.environ.get("CXX", ""))
    for words in [given] if given else [["c++"], ["g++"], ["clang++"]]:
        path = shutil.which(words[0])
        said = _ask([path, *words[1:], "--version"]) if path else None
        if path and said:
            return Tool((path, *words[1:]), said.splitlines()[0])
    return None


def find_ninja() -> Tool | None:
    """ninja on the path, or beside the Python that runs, whose environment may not be active."""
    path = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    said = _ask([path, "--version"]) if path else None
    return Tool((path,), said.strip()) if path and said else None


def find_nvcc(torch_cuda: str | None) -> Nvcc | None:
    """The nvcc to use with a PyTorch made for CUDA ``torch_cuda``.

    The first with the same major version; where there is none, the first at all.
    """
    where = tuple(os.environ.get(name, "") for name in _WHERE)
    return _find_nvcc((torch_cuda or "").split(".")[0], where)


@functools.lru_cache
def _find_nvcc(major: str, _where: tuple[str, ...]) -> Nvcc | None:
    first = None
    for path in dict.fromkeys(_nvcc_paths()):
        nvcc = _describe_nvcc(path)
        if nvcc is not None and str(nvcc.major) == major:
            return nvcc
        first = first or nvcc
    return first


def _nvcc_paths() -> Iterator[str]:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(name):
            yield str(Path(home, "bin", "nvcc"))
    if found := shutil.which("nvcc"):
        yield found
    yield from map(str, sorted(Path("/usr/local").glob("cuda*/bin/nvcc")))
    # The toolkit as Python packages.
    packages = Path(sysconfig.get_path("purelib"), "nvidia")
    yield from map(str, sorted(packages.glob("*/bin/nvcc")))


def _describe_nvcc(path: str) -> Nvcc | None:
    """Ask the nvcc at ``path``; ``None`` if it does not answer like one."""
    release = re.search(r"release (\d+\.\d+)", _ask([path, "--version"]) or "")
    if release is None:
        return None
    told: dict[str, str] = {}
    # The file need not exist: with --dryrun nothing is read.
    for line in (_ask([path, "--dryrun", "-c", "none.cu"]) or "").splitlines():
        if match := re.match(r"#\$ (\w+)=(.*)", line):
            told[match[1]] = match[2].strip()
    real = Path(told.get("_HERE_", ""), "nvcc")
    command = str(real) if "_HERE_" in told and real.exists() else path
    include = _folders(told, "INCLUDES", "-I") + _folders(told, "SYSTEM_INCLUDES", "-isystem")
    codes = _ask([command, "--list-gpu-code"]) or ""
    ptx = _ask([command, "--list-gpu-arch"]) or ""
    return Nvcc(
        (command,),
        release[1],
        tuple(re.findall(r"\b(?:sm|compute)_\w+", f"{codes}\n{ptx}")),
        include,
        tuple(f for f in _folders(told, "LIBRARIES", "-L") if not f.endswith("stubs")),
    )


def _folders(told: dict[str, str], name: str, option: str) -> tuple[str, ...]:
    """``-L/a/b -L/c`` -> the folders that exist. The whole may be quoted, and its parts."""
    words = shlex.split(told.get(name, ""))
    if len(words) == 1 and " -" in words[0]:
        words = shlex.split(words[0])
    paths = [os.path.normpath(word.removeprefix(option)) for word in words if word != option]
    # Compilers look into /usr/include by themselves, and lose their way when it is named.
    return tuple(path for path in paths if Path(path).is_dir() and path != "/usr/include")


def _ask(command: list[str]) -> str | None:
    """What a program prints, or ``None`` if it does not run or fails."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=30, check=False,
            stdin=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout + done.stderr if done.returncode == 0 else None
