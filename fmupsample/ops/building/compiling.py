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


class Tools(NamedTuple):
    """The paths of all that a build needs; ``None``: it was not found."""

    nvcc: str | None
    cxx: str | None
    ninja: str | None

    def identity(self) -> list[str]:
        """Paths and versions, by which a later process sees that it has the same tools."""
        return [f"{version(path)}, {path}" for path in self if path]


def find_tools(torch_cuda: str | None) -> Tools:
    """What this machine has, for a PyTorch made for CUDA ``torch_cuda``.

    ``nvcc`` is the first of the same major version, else the first at all, in its toolkit and not
    a script that starts it.
    """
    found = [path for path in dict.fromkeys(map(_real_nvcc, _nvcc_paths())) if path]
    fitting = [path for path in found if _major(version(path)) == _major(torch_cuda or "")]
    # cpp_extension takes one word for the C++ compiler, and puts ccache in front by itself.
    given = [word for word in shlex.split(os.environ.get("CXX", "")) if not word.startswith("-")][
        -1:
    ]
    cxx = filter(None, map(shutil.which, given or ["c++", "g++", "clang++"]))
    # ninja may be beside the Python that runs, in an environment that is not active.
    beside = str(Path(sys.executable).parent)
    ninja = shutil.which("ninja") or shutil.which("ninja", path=beside)
    return Tools(next(iter(fitting or found), None), next(cxx, None), ninja)


def required_tools(torch_cuda: str | None) -> Tools:
    """The tools that a build needs; ``torch_cuda`` is ``None`` where there is no CUDA source.

    Raises:
        ExtensionError: something is missing, or nvcc does not fit PyTorch.
    """
    tools = find_tools(torch_cuda)
    if torch_cuda and not tools.nvcc:
        raise ExtensionError("nvcc, the CUDA compiler, was not found", "nvcc")
    if torch_cuda and _major(version(tools.nvcc)) != _major(torch_cuda):
        raise ExtensionError(
            f"nvcc is of CUDA {version(tools.nvcc)} and PyTorch of CUDA {torch_cuda}: "
            "their major versions must be the same",
            "version",
        )
    if not tools.cxx:
        raise ExtensionError("no C++ compiler was found (c++, g++, clang++ or $CXX)", "compiler")
    if not tools.ninja:
        raise ExtensionError("ninja was not found; `pip install ninja` brings it", "ninja")
    return tools if torch_cuda else tools._replace(nvcc=None)


def version(tool: str) -> str:
    """What a tool says of its version, e.g. ``13.0`` of nvcc."""
    said = _ask(tool, "--version")
    release = re.search(r"release (\d+\.\d+)", said)
    return release[1] if release else said.partition("\n")[0]


def known_codes(nvcc: str) -> list[int]:
    """What ``nvcc`` can compile for: 90 for compute capability 9.0, ..."""
    return [int(code) for code in re.findall(r"\bsm_(\d+)\b", _ask(nvcc, "--list-gpu-code"))]


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
    flags = [word for word in shlex.split(os.environ.get("CXX", "")) if word.startswith("-")]
    cuda, include = list(_NVCC_FLAGS), []
    files = sum(path.suffix == ".cu" for path in sources)
    if files:
        home = Path(tools.nvcc).parents[1]
        homes = [home, *sorted(home.glob("targets/*")), *_PACKAGES.glob("cu[0-9]*")]
        include = [str(h / "include") for h in homes if h != Path("/usr")]
        # Python packages lack the plain name of the CUDA runtime, by which the linker finds it.
        for runtime in [file for h in homes for file in sorted(h.glob("lib*/libcudart.so*"))][:1]:
            (work / "libcudart.so").symlink_to(runtime)
        cuda += [f"-gencode=arch={t.replace('sm_', 'compute_')},code={t}" for t in targets]
        # Compilers beyond one for each file share the architectures of a file.
        cuda += ["--threads", str(max(1, jobs // files))]
    return {
        "name": _NAME,
        "sources": [str(path.resolve()) for path in sources],
        "extra_cflags": [*flags, *_CXX_FLAGS],
        "extra_cuda_cflags": cuda,
        # Without what it does not need, such as PyTorch's Python module.
        "extra_ldflags": [*flags, "-L.", "-Wl,--as-needed"],
        "extra_include_paths": include,
        "build_directory": str(work),
        "with_cuda": files > 0,
        "is_python_module": False,
        "verbose": True,
    }


def _environment(work: Path, tools: Tools, jobs: int) -> dict[str, str]:
    """What ``cpp_extension`` and the compilers read."""
    beside = str(Path(tools.ninja).parent)
    home = {"CUDA_HOME": str(Path(tools.nvcc).parents[1])} if tools.nvcc else {}
    return {
        **os.environ,
        **home,
        "CXX": tools.cxx,
        "CC": os.environ.get("NVCC_CCBIN") or tools.cxx,  # the C++ compiler that nvcc uses
        "MAX_JOBS": str(jobs),
        "PATH": os.pathsep.join([os.environ.get("PATH", ""), beside]),
        "TMPDIR": str(work),
        "TORCH_EXTENSION_SKIP_NVCC_GEN_DEPENDENCIES": "1",  # they serve a second build only
        "LC_ALL": "C",
    }


def _nvcc_paths() -> Iterator[str]:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    yield from (str(Path(home, "bin", "nvcc")) for home in homes)
    yield shutil.which("nvcc") or ""
    yield from map(str, sorted(Path("/usr/local").glob("cuda*/bin/nvcc")))
    yield from map(str, sorted(_PACKAGES.glob("*/bin/nvcc")))


def _real_nvcc(path: str) -> str | None:
    """The nvcc that ``path``, which may be a script, starts; ``None`` if that is none."""
    # The file need not exist: with --dryrun nothing is read.
    here = re.search(r"#\$ _HERE_=(.+)", _ask(path, "--dryrun", "-c", "none.cu"))
    return shutil.which("nvcc", path=here[1].strip()) if here else None


def _major(release: str) -> str:
    return release.partition(".")[0]


def _ask(*command: str) -> str:
    """What a program prints; nothing if it does not run or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=30, check=False,
            stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return "" if done.returncode else done.stdout + done.stderr
