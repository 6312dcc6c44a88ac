"""The compiled extension: architectures, tools, the cache, failures. Needs no GPU and no nvcc."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from fmupsample.errors import ExtensionError, UsageError
from fmupsample.ops.building import compiling, extension
from fmupsample.ops.building.architectures import covers, native_targets, parse_targets
from fmupsample.ops.building.cache import WAITING
from fmupsample.ops.building.compiling import (
    Tools,
    compile_library,
    find_tools,
    first_error,
    required_tools,
)
from fmupsample.ops.building.extension import Extension

KNOWN = [75, 80, 86, 89, 90]
USUAL = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "compute_90")
TOOLS = Tools(None, "g++", "ninja")

needs_compiler = pytest.mark.skipif(
    None in find_tools(None)[1:], reason="needs a C++ compiler and ninja"
)


# -- architectures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("8.0;9.0+PTX", ("sm_80", "sm_90", "compute_90")),
        ("sm_90 75,8.6", ("sm_75", "sm_86", "sm_90")),
        ("Ampere Hopper+PTX", ("sm_80", "sm_86", "sm_90", "compute_90")),
        ("compute_80,12.0,9.0a", ("sm_90", "sm_120", "compute_80")),
    ],
)
def test_architectures_are_written_as_everywhere(text, targets) -> None:
    assert parse_targets(text) == targets


@pytest.mark.parametrize("text", ["", "9", "nine", "sm_", "8.0 x", "9.0+ptxx"])
def test_what_is_no_architecture_is_refused(text) -> None:
    with pytest.raises(UsageError, match="architecture"):
        parse_targets(text)


@pytest.mark.parametrize(
    ("targets", "capability", "runs"),
    [
        (("sm_90",), (9, 0), True),
        (("sm_80",), (8, 9), True),  # machine code serves its own major version, upwards
        (("sm_89",), (8, 6), False),
        (("sm_90",), (10, 0), False),
        (("compute_90",), (12, 0), True),
        (("compute_75",), (9, 0), False),  # runs, but without the instructions chosen for 9.0
        ((), (9, 0), False),
    ],
)
def test_what_runs_on_what(targets, capability, runs) -> None:
    assert covers(targets, capability) is runs


def test_targets_for_the_gpus_at_hand() -> None:
    assert native_targets([(9, 0), (8, 0), (9, 0)], KNOWN) == ("sm_80", "sm_90")
    assert native_targets([(8, 7)], KNOWN) == ("sm_86",)  # nvcc does not know it, its major version
    assert native_targets([(12, 0)], KNOWN) == ("compute_90",)  # the driver compiles
    with pytest.raises(ExtensionError, match=r"capability 8\.0"):
        native_targets([(8, 0)], [90])


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch) -> Extension:
    """An extension with CUDA sources, on a machine with nvcc and without a GPU."""
    (tmp_path / "k.cu").write_text("")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(extension, "capabilities", list)
    monkeypatch.setattr(compiling, "required_tools", lambda cuda: TOOLS._replace(nvcc="nvcc"))
    monkeypatch.setattr(compiling, "known_codes", lambda nvcc: KNOWN)
    return Extension(tmp_path, tmp_path / "cache")


def test_targets_for_gpus_elsewhere(kernels, monkeypatch) -> None:
    assert kernels.targets("all") == kernels.targets("listed") == USUAL
    # Lists made for many programs name more than the kernels or nvcc know.
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "5.2 7.0 8.0 12.0+PTX")
    assert kernels.targets("listed") == ("sm_80",) and kernels.targets("all") == USUAL
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0")
    with pytest.raises(UsageError, match="sm_70 is not supported by the kernels"):
        kernels.targets("listed")
    with pytest.raises(UsageError, match=r"sm_60, sm_120 is not .* 7\.5 and newer, .* sm_75, "):
        kernels.targets("6.0,8.0,12.0")
    with pytest.raises(ExtensionError, match=r"capability 7\.5, found none"):
        kernels.targets()
    monkeypatch.setattr(extension, "capabilities", lambda: [(6, 1), (9, 0)])
    assert kernels.targets() == ("sm_90",)  # 6.1 uses plain PyTorch


# -- tools ----------------------------------------------------------------------------------------


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def toolkit(home: Path, release: str) -> Path:
    """Something that answers as nvcc does, also where it is."""
    return program(
        home / "bin/nvcc",
        f"""case "$1" in
--version) echo "Cuda compilation tools, release {release}, V{release}.1" ;;
--dryrun) echo '#$ _HERE_={home}/bin' >&2 ;;
--list-gpu-code) echo sm_80; echo sm_90 ;;
esac""",
    )


@pytest.fixture
def no_toolkits(monkeypatch, tmp_path: Path) -> None:
    """As if there were none but those a test makes and puts on the path."""
    kept = compiling._nvcc_paths
    monkeypatch.setattr(
        compiling,
        "_nvcc_paths",
        lambda: (path for path in kept() if path.startswith(str(tmp_path))),
    )
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)


@pytest.mark.usefixtures("no_toolkits")
def test_the_real_nvcc_is_found_behind_a_script(monkeypatch, tmp_path: Path) -> None:
    real = toolkit(tmp_path / "cuda-13.0", "13.0")
    wrapper = program(tmp_path / "bin/nvcc", f'exec {real} "$@"')
    monkeypatch.setenv("PATH", str(wrapper.parent), prepend=":")
    tools = TOOLS._replace(nvcc=find_tools("13.2").nvcc)
    assert tools.nvcc == str(real) and compiling.version(str(real)) == "13.0"
    assert compiling.known_codes(str(real)) == [80, 90]
    # cpp_extension takes the toolkit from there, and the runtime by the name that the linker knows.
    assert compiling._environment(tmp_path, tools, 2)["CUDA_HOME"] == str(tmp_path / "cuda-13.0")
    (tmp_path / "cuda-13.0/lib").mkdir()
    (tmp_path / "cuda-13.0/lib/libcudart.so.13").write_text("")
    settings = compiling._settings([tmp_path / "k.cu"], tmp_path, tools, ("sm_90", "compute_90"), 2)
    assert settings["extra_include_paths"][0] == str(tmp_path / "cuda-13.0/include")
    assert (tmp_path / "libcudart.so").resolve().name == "libcudart.so.13"
    assert {
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    } < set(settings["extra_cuda_cflags"])


@pytest.mark.usefixtures("no_toolkits")
def test_of_several_the_nvcc_that_fits_pytorch_is_taken(monkeypatch, tmp_path: Path) -> None:
    old, new = toolkit(tmp_path / "old", "11.8"), toolkit(tmp_path / "new", "12.4")
    monkeypatch.setenv("CUDA_HOME", str(old.parent.parent))
    monkeypatch.setenv("PATH", str(new.parent), prepend=":")
    assert find_tools("12.8").nvcc == str(new)
    assert find_tools("11.8").nvcc == str(old)
    with pytest.raises(ExtensionError, match=r"CUDA 11\.8 and PyTorch of CUDA 13\.2") as caught:
        required_tools("13.2")
    assert caught.value.kind == "version"


@pytest.mark.usefixtures("no_toolkits")
def test_a_missing_tool_is_named(monkeypatch, tmp_path: Path) -> None:
    def reason(cuda: str | None) -> tuple[str, str]:
        with pytest.raises(ExtensionError) as caught:
            required_tools(cuda)
        return caught.value.kind, str(caught.value)

    assert reason("13.0") == ("nvcc", "nvcc, the CUDA compiler, was not found")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "env/bin/python"))
    assert reason(None)[0] == "compiler"
    cxx = program(tmp_path / "bin/c++", "echo c++ 12")
    kind, said = reason(None)
    assert kind == "ninja" and "pip install ninja" in said
    # In the environment of the Python that runs, whether or not that is active.
    ninja = program(tmp_path / "env/bin/ninja", "echo 1.13.0")
    assert required_tools(None) == (None, str(cxx), str(ninja))
    assert compiling.version(str(cxx)) == "c++ 12" and compiling.version(str(ninja)) == "1.13.0"
    # cpp_extension takes one word.
    monkeypatch.setenv("CXX", f"ccache {cxx} -m64")
    tools = required_tools(None)
    assert tools.cxx == str(cxx)
    assert "-m64" in compiling._settings([], tmp_path, tools, (), 1)["extra_cflags"]


# -- compiling ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log", "line"),
    [
        (
            "[1/3] c++ -DERROR=error -o a.o\nFAILED: a.o\nc++ -c a.cpp -o a.o error\n"
            "In file included from /x/y.h:1,\n/long/way/a.cpp:7:3: error: 'q' was not declared\n",
            "a.cpp:7:3: error: 'q' was not declared",
        ),
        ('/a/k.cu(2): error: "f" is undefined', 'k.cu(2): error: "f" is undefined'),
        ("nvcc fatal   : Unsupported gpu", "nvcc fatal   : Unsupported gpu"),
        ("c++: fatal error: Killed signal", "c++: fatal error: Killed signal"),
        ("/usr/bin/ld: cannot find -lc10", "ld: cannot find -lc10"),
        ("what is this", "what is this"),
        ("", "no output"),
    ],
)  # fmt: skip
def test_the_first_error_of_a_log(log, line) -> None:
    assert first_error(log) == line
    assert len(first_error("error: " + 300 * "x")) == 200


@needs_compiler
def test_a_broken_source_is_explained(tmp_path: Path) -> None:
    source = tmp_path / "op.cpp"
    source.write_text("int f() { return nothing; }\n")
    work = tmp_path / "wörk 1"
    work.mkdir()
    heard: list[str] = []
    with pytest.raises(ExtensionError, match=r"op\.cpp:1:18: error: .*nothing") as caught:
        compile_library(
            [source], work, required_tools(None), (),
            log=tmp_path / "log", timeout=600, output=heard.append,
        )  # fmt: skip
    assert caught.value.kind == "compile" and caught.value.log == str(tmp_path / "log")
    assert "".join(heard) == (tmp_path / "log").read_text() and "-c " in "".join(heard)


@pytest.mark.parametrize("how", ["timeout", "interrupted"])
def test_a_build_without_end_is_stopped(tmp_path: Path, monkeypatch, how: str) -> None:
    alive = tmp_path / "alive"
    # What ninja starts has to go as well.
    ninja = program(tmp_path / "ninja", f"(while sleep 0.05; do touch {alive}; done) & wait")
    monkeypatch.setattr(compiling, "_CHILD", f"import subprocess; subprocess.run({str(ninja)!r})")
    steps: list[tuple[str, float]] = []

    def progress(what: str, seconds: float) -> None:
        steps.append((what, seconds))
        if how == "interrupted" and alive.exists():
            raise KeyboardInterrupt

    expected = ExtensionError if how == "timeout" else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        compile_library(
            [], tmp_path, TOOLS, (),
            log=tmp_path / "log", timeout=1 if how == "timeout" else 600, progress=progress,
        )  # fmt: skip
    if how == "timeout":
        assert caught.value.kind == "timeout" and "not compiled after 1 s" in str(caught.value)
    assert steps[0][0] == compiling.COMPILING and steps[0][1] < steps[-1][1]
    alive.unlink(missing_ok=True)
    time.sleep(0.2)
    assert not alive.exists()


@needs_compiler
def test_a_stand_in_is_compiled_loaded_and_found_again(tmp_path: Path, monkeypatch) -> None:
    """The one real compilation of the tests: an operator for the CPU."""
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "twice.cpp").write_text(
        "#include <torch/library.h>\n"
        '#include "factor.h"\n'
        "static int64_t times(int64_t x) { return factor * x; }\n"
        'TORCH_LIBRARY_FRAGMENT(fmupsample_stand_in, m) { m.def("twice(int x) -> int", &times); }\n'
    )
    (sources / "factor.h").write_text("constexpr int factor = 2;\n")
    library = Extension(sources, tmp_path / "cache", tmp_path).load()
    assert library.fresh and library.targets == ()
    assert torch.ops.fmupsample_stand_in.twice(21) == 42
    monkeypatch.setattr(compiling, "compile_library", never)
    assert Extension(sources, tmp_path / "cache", tmp_path).load().path == library.path
    assert {path.name for path in library.path.parent.iterdir()} == {
        ".lock", library.path.name, library.path.with_suffix(".json").name,
    }  # fmt: skip


# -- the cache ------------------------------------------------------------------------------------


class Compiler:
    """Writes a library without compiling, or fails, or takes its time."""

    def __init__(self, error: BaseException | None = None, seconds: float = 0.0) -> None:
        self.error, self.seconds, self.calls = error, seconds, 0

    def __call__(self, sources, work, tools, targets, *, log, **options) -> Path:
        self.calls += 1
        time.sleep(self.seconds)
        log.write_text("what the compilers said")
        (work / "x.o").write_text("object")
        library = work / "x.so"
        library.write_text("half")
        if self.error is not None:
            raise self.error
        library.write_text("a whole library")
        return library


def never(*_arguments, **_options) -> None:
    raise AssertionError("compiled once more")


def broken(log: str = "") -> ExtensionError:
    return ExtensionError(
        "the CUDA extension does not compile: op.cpp:1: error: no", "compile", log
    )


@pytest.fixture
def sources(tmp_path: Path, monkeypatch) -> Path:
    """A source folder, on a machine that has the tools."""
    monkeypatch.setattr(compiling, "required_tools", lambda cuda: TOOLS)
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "op.cpp").write_text("int x;\n")
    return folder


@pytest.fixture
def make(sources: Path, tmp_path: Path, monkeypatch):
    """``make(compiler)``: an extension as a new process would see it; nothing is really loaded."""

    def extension_of(compiler=never) -> Extension:
        monkeypatch.setattr(compiling, "compile_library", compiler)
        made = Extension(sources, tmp_path / "cache", tmp_path / "package")
        made.open = lambda library: None
        return made

    return extension_of


def test_compiled_once_then_found(make) -> None:
    compiler = Compiler()
    made = make(compiler).load()
    assert made.fresh and made.path.read_text() == "a whole library"
    found = make().load()
    assert (found.path, found.fresh, found.torch) == (made.path, False, torch.__version__)
    assert make().build(()).path == made.path and compiler.calls == 1
    assert make(compiler).build((), force=True).fresh and compiler.calls == 2
    assert {p.name for p in made.path.parent.iterdir()} == {
        ".lock", made.path.name, made.path.with_suffix(".json").name,
    }  # fmt: skip


def test_the_key_holds_all_that_matters(make, sources: Path, monkeypatch) -> None:
    keys = [make().key()]
    (sources / "op.cpp").write_text("int y;\n")
    keys.append(make().key())
    (sources / "more.cuh").write_text("")
    keys.append(make().key())
    (sources / "notes.txt").write_text("not compiled")
    assert make().key() == keys[-1]
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    keys.append(make().key())
    monkeypatch.setattr(torch.version, "cuda", "99.1")
    keys.append(make().key())
    assert len(set(keys)) == 5


def test_a_build_for_more_gpus_serves_fewer(make) -> None:
    built = make(Compiler()).build(("sm_80", "sm_90", "compute_90"))
    assert make().cached([(8, 6), (9, 0)]).path == built.path
    assert make().cached([(7, 5)]) is None
    assert make().cached([(6, 1), (12, 0)]).path == built.path  # 6.1 uses plain PyTorch anyway


def test_a_damaged_library_is_not_used(make) -> None:
    built = make(Compiler()).build(())
    built.path.write_text("a who")
    assert make().cached() is None
    assert make(Compiler()).load().path.read_text() == "a whole library"


@pytest.mark.parametrize("place", ["cache", "library"])
def test_a_library_that_others_can_write_is_not_loaded(make, place: str) -> None:
    built = make(Compiler()).build(())
    {"library": built.path, "cache": built.path.parent}[place].chmod(0o777)
    assert make().cached() is None
    again = make(Compiler()).build(())
    # What is inside a cache that was open, and is our own, is still ours once it is closed.
    assert again.fresh or place == "cache"
    assert make().cached().path == again.path
    assert again.path.parent.stat().st_mode & 0o777 == 0o700


def test_a_link_in_the_cache_is_not_loaded(make, tmp_path: Path) -> None:
    built = make(Compiler()).build(())
    built.path.rename(tmp_path / "elsewhere.so")
    built.path.symlink_to(tmp_path / "elsewhere.so")
    assert make().cached() is None


def test_a_cache_that_others_could_exchange_is_not_used(make, tmp_path: Path) -> None:
    """The cache is the user's, but a stranger could rename it and put another in its place."""
    make(Compiler()).build(())
    tmp_path.chmod(0o777)
    assert make().cached() is None
    with pytest.raises(ExtensionError, match=r"cannot write to .*folder above it.*CACHE") as caught:
        make().load()
    assert caught.value.kind == "cache"
    tmp_path.chmod(0o1777)  # as /tmp: only the owner of a folder can rename it
    assert make().load().path.is_file()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("place", ["above", "cache", "library"])
def test_what_belongs_to_another_user_is_not_loaded(make, tmp_path: Path, place: str) -> None:
    built = make(Compiler()).build(())
    os.chown(
        {"above": tmp_path, "cache": built.path.parent, "library": built.path}[place], 4242, -1
    )
    assert make().cached() is None
    if place == "library":
        assert make(Compiler()).build(()).fresh  # of our own, in its place
    elif place == "above":
        with pytest.raises(ExtensionError, match="another user could exchange it"):
            make().build(())


def test_the_log_of_a_build_into_the_package_cannot_be_planted(make, tmp_path, monkeypatch) -> None:
    logs = []

    def compiler(sources, work, *arguments, log: Path, **options) -> Path:
        logs.append(log)
        assert log.parent.stat().st_mode & 0o777 == 0o700
        return Compiler()(sources, work, *arguments, log=log, **options)

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for _ in range(2):
        make(compiler).build_into(tmp_path / "package/_cuda.so", ())
    assert logs[0] != logs[1] and not logs[0].parent.exists()


def test_what_a_killed_build_left_is_not_used_and_goes(make, tmp_path: Path) -> None:
    left = tmp_path / "cache/.build-abc"
    left.mkdir(parents=True)
    (left / "fmupsample_cuda.so").write_text("half")
    assert make().cached() is None
    make(Compiler()).load()
    assert not left.exists()


def test_a_disk_without_locks_serves_as_well(make, tmp_path: Path, monkeypatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    others = tmp_path / "cache/.build-abc"
    others.mkdir(parents=True)
    assert make(Compiler()).load().fresh and others.exists()  # another process may be at it


def test_the_lock_of_a_killed_build_is_free(make, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from fmupsample.ops.building.cache import locked\n"
        "with locked(Path(sys.argv[1]), None):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cache/.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as builder:
        assert builder.stdout.readline() == b"held\n"
        waits: list[str] = []

        def progress(what: str, seconds: float) -> None:
            waits.append(what)
            builder.kill()

        assert make(Compiler()).load(progress).fresh
    assert set(waits) == {WAITING}


def test_an_interrupted_build_leaves_nothing(make, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(Compiler(KeyboardInterrupt())).load()
    assert not list((tmp_path / "cache").glob("*/*")) and make().cached() is None
    assert make(Compiler()).load().fresh


def test_two_processes_do_not_compile_at_once(make) -> None:
    compiler, waits, libraries = Compiler(seconds=0.4), [], []

    def run() -> None:
        progress = lambda what, seconds: waits.append(what)  # noqa: E731
        libraries.append(make(compiler).load(progress))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiler.calls == 1 and set(waits) == {WAITING}
    assert sorted(library.fresh for library in libraries) == [False, True]


def test_one_process_loads_once_from_many_threads(make) -> None:
    one, opened = make(Compiler(seconds=0.1)), []
    one.open = opened.append
    threads = [threading.Thread(target=one.load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 1 and one.loaded is opened[0]


# -- failures -------------------------------------------------------------------------------------


def test_a_failure_is_remembered_explained_and_not_repeated(make, tmp_path: Path) -> None:
    failing = Compiler(broken("the.log"))
    first = make(failing)
    for _ in range(2):  # the same process
        with pytest.raises(ExtensionError, match="error: no"):
            first.load()
    with pytest.raises(
        ExtensionError, match=r"error: no .*`fmupsample build` tries again"
    ) as caught:
        make().load()  # the next one
    assert failing.calls == 1
    assert caught.value.kind == "compile" and caught.value.log == "the.log"
    assert "\n" not in str(caught.value) and make().remembered() is not None
    assert make().remembered(("sm_90",)) is None
    assert list((tmp_path / "cache").glob("*.log"))  # what it names is there
    # `fmupsample build` does not care, and what worked is forgotten.
    assert make(Compiler()).build(()).fresh
    assert make().remembered() is None and not list((tmp_path / "cache").glob("*.log"))


def test_other_tools_or_sources_are_tried(make, sources: Path, monkeypatch) -> None:
    with pytest.raises(ExtensionError):
        make(Compiler(broken())).load()
    other = TOOLS._replace(cxx="clang++")
    with monkeypatch.context() as context:
        context.setattr(compiling, "required_tools", lambda cuda: other)
        assert make(Compiler()).load().fresh
    with pytest.raises(ExtensionError):
        make(Compiler(broken())).build((), force=True)
    (sources / "op.cpp").write_text("int mended;\n")
    assert make(Compiler()).load().fresh


def test_a_missing_tool_is_not_remembered(make, monkeypatch) -> None:
    def missing(cuda):
        raise ExtensionError("ninja was not found", "ninja")

    with monkeypatch.context() as context:
        context.setattr(compiling, "required_tools", missing)
        with pytest.raises(ExtensionError, match="ninja"):
            make().load()
    assert make(Compiler()).load().fresh


def test_a_cache_that_cannot_be_written(make, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file is in the way")
    with pytest.raises(ExtensionError, match=r"cannot write to .*FMUPSAMPLE_CACHE") as caught:
        make().load()
    assert caught.value.kind == "cache"


def test_a_library_that_does_not_load_is_explained(make, sources: Path, tmp_path: Path) -> None:
    make(Compiler())
    damaged = Extension(sources, tmp_path / "cache", tmp_path)
    for _ in range(2):
        with pytest.raises(ExtensionError, match=r"does not load: .*build --force") as caught:
            damaged.load()
        assert caught.value.kind == "load"
    assert make(Compiler()).build((), force=True).fresh


@pytest.mark.parametrize(
    ("files", "cuda", "kind"),
    [
        ({}, "13.0", "absent"),
        ({"k.cu": ""}, None, "torch"),
        ({"k.cu": ""}, "13.0", "gpu"),  # there is none
    ],
)
def test_where_it_cannot_be(make, sources: Path, monkeypatch, files, cuda, kind) -> None:
    (sources / "op.cpp").unlink()
    for name, text in files.items():
        (sources / name).write_text(text)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(extension, "capabilities", list)
    monkeypatch.setattr(compiling, "required_tools", lambda cuda: TOOLS._replace(nvcc="nvcc"))
    with pytest.raises(ExtensionError) as caught:
        make().load()
    assert caught.value.kind == kind


# -- compiled at installation ---------------------------------------------------------------------


def test_a_library_in_the_package_comes_first(make, tmp_path: Path) -> None:
    make(Compiler()).build(("sm_90",))
    ahead = make(Compiler()).build_into(tmp_path / "package/_cuda.so", ("sm_80", "sm_90"), jobs=2)
    assert make().load().path == ahead.path
    library, refused = make().packaged([(7, 5)])
    assert library is None and "holds sm_80, sm_90, not for this GPU" in refused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"torch": "1.0.0"}, r"compiled for PyTorch 1\.0\.0, this is"),
        ({"key": "0" * 16}, "from other sources"),
        ({"bytes": 3}, "is damaged"),
        (None, "is damaged"),
    ],
)
def test_a_stale_library_in_the_package_is_refused(make, tmp_path, change, said) -> None:
    path = tmp_path / "package/_cuda.so"
    make(Compiler()).build_into(path, ("sm_90",))
    facts = path.with_suffix(".json")
    if change is None:
        facts.unlink()
    else:
        facts.write_text(json.dumps(json.loads(facts.read_text()) | change))
    library, refused = make().packaged()
    assert library is None
    assert re.search(said, refused)
    assert make(Compiler()).load().path.is_relative_to(tmp_path / "cache")


def test_nothing_is_left_of_a_failed_build_into_the_package(make, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ExtensionError):
        make(Compiler(broken())).build_into(tmp_path / "package/_cuda.so", ("sm_90",))
    assert not list(tmp_path.glob("package/*"))
