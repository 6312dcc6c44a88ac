"""Compile C++ and CUDA sources with ``torch.utils.cpp_extension``, in a process of its own.

``cpp_extension`` reads its settings from the environment when it is imported, loads what it has
built, and cannot be stopped. A process of its own is given its environment, proves that the library
loads, and is killed when its time is up.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from fmupsample.errors import ExtensionError
from fmupsample.threads import cores

# Is told several times a second what is being done, and for how many seconds.
Progress = Callable[[str, float], None]

COMPILING = "compiling the CUDA extension, once"
_CXX_FLAGS = ("-O3",)
# Compressed, machine code takes an eighth of the space, and no longer to make.
_NVCC_FLAGS = ("-O3", "-Xfatbin=-compress-all")
FLAGS = (*_CXX_FLAGS, *_NVCC_FLAGS)

_NAME = "fmupsample_cuda"
_CHILD = "import json, sys, torch.utils.cpp_extension as e; e.load(**json.loads(sys.argv[1]))"
_PACKAGES = Path(torch.__file__).parents[1] / "nvidia"  # the CUDA toolkit as Python packages


@dataclass(frozen=True)
class Tool:
    """A compiler or ninja.

    Attributes:
        path: the program itself; of nvcc that in its toolkit, not a script that starts it.
        flags: what the C++ compiler is always given.
        targets: what nvcc can compile for: ``sm_80``, ..., ``compute_80``, ...
    """

    path: str
    version: str
    flags: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.version}, {shlex.join([self.path, *self.flags])}"


class Tools(NamedTuple):
    """All that a build needs; ``nvcc`` is ``None`` where there is no CUDA source."""

    cxx: Tool
    ninja: Tool
    nvcc: Tool | None


def find_tools(torch_cuda: str | None) -> Tools:
    """The tools for an extension of a PyTorch made for CUDA ``torch_cuda`` (``None``: no CUDA).

    Raises:
        ExtensionError: something is missing, or nvcc does not fit PyTorch.
    """
    nvcc = find_nvcc(torch_cuda) if torch_cuda else None
    if torch_cuda and nvcc is None:
        raise ExtensionError("nvcc, the CUDA compiler, was not found", "nvcc")
    if torch_cuda and nvcc and _major(nvcc.version) != _major(torch_cuda):
        raise ExtensionError(
            f"nvcc is of CUDA {nvcc.version} and PyTorch of CUDA {torch_cuda}: "
            "their major versions must be the same",
            "version",
        )
    cxx, ninja = find_cxx(), find_ninja()
    if cxx is None:
        raise ExtensionError("no C++ compiler was found (c++, g++, clang++ or $CXX)", "compiler")
    if ninja is None:
        raise ExtensionError("ninja was not found; `pip install ninja` brings it", "ninja")
    return Tools(cxx, ninja, nvcc)


def find_cxx() -> Tool | None:
    """The C++ compiler: that of ``$CXX``, with its flags, or one of the usual names."""
    given = shlex.split(os.environ.get("CXX", ""))
    flags = tuple(word for word in given if word.startswith("-"))
    # cpp_extension takes a single word, and puts ccache in front of it by itself.
    names = [word for word in given if word not in flags][-1:] or ["c++", "g++", "clang++"]
    for path in filter(None, map(shutil.which, names)):
        if said := _ask(path, "--version"):
            return Tool(path, said.splitlines()[0], flags)
    return None


def find_ninja() -> Tool | None:
    """ninja on the path, or beside the Python that runs, whose environment may not be active."""
    path = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    said = _ask(path, "--version") if path else None
    return Tool(path, said.strip()) if path and said else None


def find_nvcc(torch_cuda: str | None) -> Tool | None:
    """The first nvcc of the major version of CUDA ``torch_cuda``, else the first at all."""
    first = None
    for path in dict.fromkeys(_nvcc_paths()):
        nvcc = _describe_nvcc(path)
        if nvcc and torch_cuda and _major(nvcc.version) == _major(torch_cuda):
            return nvcc
        first = first or nvcc
    return first


def compile_library(
    sources: Sequence[Path],
    work: Path,
    tools: Tools,
    targets: Sequence[str],
    *,
    log: Path,
    timeout: float,
    jobs: int | None = None,
    progress: Progress | None = None,
    output: Callable[[str], None] | None = None,
) -> Path:
    """Compile ``sources`` into a library in the empty folder ``work``.

    Args:
        targets: GPU architectures as nvcc names them.
        log: file for everything the compilers say.
        timeout: in seconds.
        jobs: compilers at a time; default ``$MAX_JOBS``, or one for each processor.
        output: is told what the compilers say as they say it.

    Raises:
        ExtensionError: it does not compile or load, or the time is up. The compilers are stopped
            then, as they are on Ctrl-C.
    """
    given = os.environ.get("MAX_JOBS", "")
    jobs = jobs or (int(given) if given.isdecimal() else 0) or cores()
    settings = json.dumps(_settings(sources, work, tools, targets, jobs))
    began = time.monotonic()
    with log.open("wb") as said, log.open("r", errors="replace") as reader:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD, settings], cwd=work, stdin=subprocess.DEVNULL,
            stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
            env=_environment(work, tools, jobs),
        )  # fmt: skip
        try:
            while process.poll() is None:
                seconds = time.monotonic() - began
                if progress:
                    progress(COMPILING, seconds)
                if output:
                    output(reader.read())
                if seconds > timeout:
                    reason = f"the CUDA extension was not compiled after {timeout:.0f} s; see {log}"
                    raise ExtensionError(reason, "timeout", str(log))
                time.sleep(0.1)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if output:
            output(reader.read())
    library = work / f"{_NAME}.so"
    if process.returncode != 0:
        kind = "load" if library.exists() else "compile"
        first = first_error(log.read_text(errors="replace"))
        reason = f"the CUDA extension does not {kind}: {first}; see {log}"
        raise ExtensionError(reason, kind, str(log))
    return library


def first_error(log: str) -> str:
    """The line that says what is wrong, without the path of the file; at most 200 characters."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    # The commands, which ninja repeats, may hold any word.
    said = [x for x in lines if not x.startswith(("[", "FAILED:")) and " -o " not in x]
    wrong = re.compile(
        r"\b(error|fatal|undefined reference|cannot find|not found)\b", re.IGNORECASE
    )
    found = next((x for x in said if wrong.search(x)), lines[-1] if lines else "no output")
    found = re.sub(r"(^|[\s:'\"])/(?:[^\s/:]+/)+", r"\1", found)
    return found if len(found) <= 200 else f"{found[:197]}..."


def _settings(
    sources: Sequence[Path], work: Path, tools: Tools, targets: Sequence[str], jobs: int
) -> dict[str, object]:
    """The arguments of ``cpp_extension.load``."""
    cuda, include = list(_NVCC_FLAGS), []
    if tools.nvcc:
        home = Path(tools.nvcc.path).parents[1]
        packages = [_PACKAGES / f"cu{_major(tools.nvcc.version)}", _PACKAGES / "cuda_runtime"]
        homes = [home, *sorted(home.glob("targets/*")), *packages]
        include = [str(h / "include") for h in homes if h != Path("/usr")]
        # Python packages lack the plain name of the CUDA runtime, by which the linker finds it.
        for runtime in [file for h in homes for file in sorted(h.glob("lib*/libcudart.so*"))][:1]:
            (work / "libcudart.so").symlink_to(runtime)
        cuda += [f"-gencode=arch={t.replace('sm_', 'compute_')},code={t}" for t in targets]
        # Compilers beyond one for each file share the architectures of a file.
        cuda += ["--threads", str(max(1, jobs // sum(path.suffix == ".cu" for path in sources)))]
    return {
        "name": _NAME,
        "sources": [str(path.resolve()) for path in sources],
        "extra_cflags": [*tools.cxx.flags, *_CXX_FLAGS],
        "extra_cuda_cflags": cuda,
        "extra_ldflags": [*tools.cxx.flags, "-L."],
        "extra_include_paths": include,
        "build_directory": str(work),
        "with_cuda": tools.nvcc is not None,
        "is_python_module": False,
        "verbose": True,
    }


def _environment(work: Path, tools: Tools, jobs: int) -> dict[str, str]:
    """What ``cpp_extension`` and the compilers read."""
    changes = {
        "CXX": tools.cxx.path,
        "CC": os.environ.get("NVCC_CCBIN") or tools.cxx.path,  # the C++ compiler that nvcc uses
        "MAX_JOBS": str(jobs),
        "PATH": os.pathsep.join([os.environ.get("PATH", ""), str(Path(tools.ninja.path).parent)]),
        "TMPDIR": str(work),
        "LC_ALL": "C",
    }
    if tools.nvcc:
        changes["CUDA_HOME"] = str(Path(tools.nvcc.path).parents[1])
    return {**os.environ, **changes}


def _nvcc_paths() -> Iterator[str]:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    yield from (str(Path(home, "bin", "nvcc")) for home in homes)
    yield from filter(None, [shutil.which("nvcc")])
    yield from map(str, sorted(Path("/usr/local").glob("cuda*/bin/nvcc")))
    yield from map(str, sorted(_PACKAGES.glob("*/bin/nvcc")))


def _describe_nvcc(path: str) -> Tool | None:
    """Ask the nvcc at ``path``, which may be a script, where it is and what it knows."""
    release = re.search(r"release (\d+\.\d+)", _ask(path, "--version") or "")
    if release is None:
        return None
    # The file need not exist: with --dryrun nothing is read.
    here = re.search(r"#\$ _HERE_=(.+)", _ask(path, "--dryrun", "-c", "none.cu") or "")
    real = here and shutil.which("nvcc", path=here[1].strip())
    codes = re.findall(r"\bsm_\w+", _ask(path, "--list-gpu-code") or "")
    codes += [code.replace("sm_", "compute_") for code in codes]
    return Tool(real or path, release[1], targets=tuple(codes))


def _major(version: str) -> str:
    return version.partition(".")[0]


def _ask(*command: str) -> str | None:
    """What a program prints, or ``None`` if it does not run or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=30, check=False,
            stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout + done.stderr if done.returncode == 0 else None
