"""Compile a folder of C++ and CUDA sources that register PyTorch operators into one library.

Not through ``torch.utils.cpp_extension``: that looks for CUDA by the path of ``nvcc`` (which may be
a script), always links Python and the toolkit's own ``libcudart.so``, loads what it built at once,
and cannot be stopped. The library made here depends on PyTorch and the CUDA runtime, not on Python.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fmupsample.errors import ExtensionError
from fmupsample.ops.building.toolchain import Nvcc, Toolchain
from fmupsample.threads import cores

# Told about every second: what is being done, and for how many seconds.
Progress = Callable[[str, float], None]

COMPILING = "compiling the CUDA extension, once"
HEADERS = (".cuh", ".h", ".hpp")

_TORCH = Path(torch.__file__).parent
_OPTIMISE = ("-O3",)


def source_files(folder: Path) -> list[Path]:
    """What is compiled: the ``.cpp`` and ``.cu`` files, in a fixed order."""
    return sorted(p for p in folder.glob("*") if p.suffix in (".cpp", ".cu"))


def has_cuda(sources: Sequence[Path]) -> bool:
    return any(path.suffix == ".cu" for path in sources)


def common_flags() -> tuple[str, ...]:
    """Flags of every source that follow from the PyTorch in use."""
    abi = int(torch.compiled_with_cxx11_abi())
    return (f"-std=c++{_standard()}", *_OPTIMISE, f"-D_GLIBCXX_USE_CXX11_ABI={abi}")


def nvcc_flags() -> tuple[str, ...]:
    # Compressed, machine code takes an eighth of the space, and no longer to make.
    return ("--expt-relaxed-constexpr", "-Xfatbin=-compress-all")


def _standard() -> int:
    """The C++ standard that PyTorch's headers ask for: 17, or 20 since some version."""
    try:
        text = (_TORCH / "include/ATen/ATen.h").read_text()
    except OSError:
        return 17
    return 20 if "__cplusplus < 202002L" in text else 17


def compile_library(
    sources: Sequence[Path],
    target: Path,
    toolchain: Toolchain,
    targets: Sequence[str],
    *,
    log: Path,
    jobs: int | None = None,
    timeout: float | None = None,
    progress: Progress | None = None,
    output: Callable[[str], None] | None = None,
) -> None:
    """Compile ``sources`` into the library ``target``; objects are left in its folder.

    Args:
        target: in a folder of its own, which exists.
        targets: GPU architectures as nvcc names them.
        log: file for everything the compilers say.
        jobs: compilers at a time; default ``$MAX_JOBS``, or one for each processor.
        output: is told what the compilers say as they say it.

    Raises:
        ExtensionError: compile error, or the time is up. The compilers are stopped then, as they
            are on Ctrl-C.
    """
    jobs = jobs or _jobs()
    work = target.parent
    (work / "tmp").mkdir(exist_ok=True)
    (work / "build.ninja").write_text(_ninja_file(sources, target, toolchain, targets, jobs))
    command = [*toolchain.ninja.command, "-v", "-j", str(jobs)]
    # Temporary files of the compilers are cleared away with the folder; English messages.
    environment = {**os.environ, "LC_ALL": "C", "TMPDIR": str(work / "tmp")}
    with log.open("wb") as said, log.open("r", errors="replace") as reader:
        process = subprocess.Popen(
            command, cwd=work, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT,
            env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            _wait(process, timeout, progress, lambda: output and output(reader.read()))
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                reason = f"the CUDA extension was not compiled after {timeout:.0f} s"
                raise ExtensionError(f"{reason}; see {log}", "timeout", str(log)) from None
            raise
    if process.returncode != 0:
        first = first_error(log.read_text(errors="replace"))
        reason = f"the CUDA extension does not compile: {first}; see {log}"
        raise ExtensionError(reason, "compile", str(log))


def _wait(
    process: subprocess.Popen,
    timeout: float | None,
    progress: Progress | None,
    listen: Callable[[], object],
) -> None:
    began = told = time.monotonic()
    if progress:
        progress(COMPILING, 0.0)
    while True:
        try:
            process.wait(0.1)
        except subprocess.TimeoutExpired:
            pass
        else:
            listen()
            return
        listen()
        now = time.monotonic()
        if timeout is not None and now - began > timeout:
            raise subprocess.TimeoutExpired("ninja", timeout)
        if progress and now - told >= 1:
            told = now
            progress(COMPILING, now - began)


def first_error(log: str) -> str:
    """The line that says what is wrong, without the path of the file; at most 200 characters."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    # Not in the commands, which ninja repeats.
    said = [x for x in lines if not x.startswith(("[", "FAILED:")) and " -o " not in x]
    wrong = re.compile(
        r"\b(error|fatal|undefined reference|cannot find|not found)\b", re.IGNORECASE
    )
    found = next((x for x in said if wrong.search(x)), lines[-1] if lines else "no output")
    found = re.sub(r"(^|[\s:'\"])/(?:[^\s/:]+/)+", r"\1", found)
    return found if len(found) <= 200 else f"{found[:197]}..."


def _jobs() -> int:
    given = os.environ.get("MAX_JOBS", "")
    return int(given) if given.isdecimal() and int(given) > 0 else cores()


def _ninja_file(
    sources: Sequence[Path],
    target: Path,
    toolchain: Toolchain,
    targets: Sequence[str],
    jobs: int,
) -> str:
    nvcc = toolchain.nvcc if has_cuda(sources) else None
    include = [_TORCH / "include", _TORCH / "include/torch/csrc/api/include"]
    if nvcc:
        include += [*nvcc.include, *_packaged(nvcc, "include")]
    flags = [*common_flags(), *(word for path in include for word in ("-isystem", str(path)))]
    cxx = toolchain.cxx.command
    rules = {
        "cxx": [*cxx, *flags, "-fPIC", "-c", "$in", "-o", "$out"],
        "link": [*cxx, "-shared", "$in", "-o", "$out", *_link_flags(nvcc)],
    }
    if nvcc:
        # Compilers beyond one for each file share the architectures of a file.
        threads = max(1, jobs // sum(path.suffix == ".cu" for path in sources))
        rules["cuda"] = [
            *nvcc.command, "-ccbin", _host_compiler(cxx), *flags, *nvcc_flags(),
            "-Xcompiler", "-fPIC", *map(_gencode, targets), "--threads", str(threads),
            "-c", "$in", "-o", "$out",
        ]  # fmt: skip
    text = ["ninja_required_version = 1.3"]
    for name, words in rules.items():
        text += [f"rule {name}", f"  command = {' '.join(map(_word, words))}"]
    objects = []
    for source in sources:
        objects.append(f"{source.name}.o")
        rule = "cuda" if source.suffix == ".cu" else "cxx"
        text.append(f"build {_path(objects[-1])}: {rule} {_path(str(source.resolve()))}")
    text.append(f"build {_path(target.name)}: link {' '.join(map(_path, objects))}")
    return "\n".join(text) + "\n"


def _link_flags(nvcc: Nvcc | None) -> list[str]:
    """PyTorch's libraries and the CUDA runtime; all are in the process before this one."""
    flags = [f"-L{_TORCH / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
    if nvcc is None:
        return flags
    flags += ["-lc10_cuda", "-ltorch_cuda"]
    # By its file: as a Python package, the runtime comes without the name -lcudart looks for.
    for folder in [*nvcc.libraries, *_packaged(nvcc, "lib")]:
        for path in sorted(Path(folder).glob("libcudart.so*")):
            return [*flags, str(path)]
    return flags


def _packaged(nvcc: Nvcc, kind: str) -> list[str]:
    """Folders of the CUDA Python packages, for what the toolkit itself lacks."""
    packages = Path(sysconfig.get_path("purelib"), "nvidia")
    folders = [*packages.glob(f"cu{nvcc.major}/{kind}"), *packages.glob(f"cuda_runtime/{kind}")]
    return [str(folder) for folder in folders]


def _host_compiler(cxx: Sequence[str]) -> str:
    """For nvcc, which takes one word: the compiler itself, without a cache in front of it."""
    return os.environ.get("NVCC_CCBIN") or next(
        (word for word in reversed(cxx) if not word.startswith("-")), cxx[0]
    )


def _gencode(target: str) -> str:
    return f"-gencode=arch={target.replace('sm_', 'compute_')},code={target}"


def _word(word: str) -> str:
    """For the shell, and for ninja: ``$in`` and ``$out`` are ninja's."""
    return word if word in ("$in", "$out") else shlex.quote(word).replace("$", "$$")


def _path(path: str) -> str:
    return re.sub(r"([$ :])", r"$\1", path)
