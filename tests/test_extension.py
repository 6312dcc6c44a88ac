"""The compiled extension: architectures, tools, the cache, failures. Needs no GPU and no nvcc."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fmupsample.errors import ExtensionError, UsageError
from fmupsample.ops.building import compiling, extension, toolchain
from fmupsample.ops.building.architectures import (
    ahead_targets,
    covers,
    listed_targets,
    parse_targets,
    targets_for,
)
from fmupsample.ops.building.compiling import compile_library, first_error
from fmupsample.ops.building.extension import WAITING, Extension
from fmupsample.ops.building.toolchain import Tool, Toolchain, find_cxx, find_ninja, find_toolchain

KNOWN = tuple(f"{kind}_{n}" for kind in ("sm", "compute") for n in (75, 80, 86, 89, 90))
TOOLS = Toolchain(Tool(("g++",), "g++ 1"), Tool(("ninja",), "1.11"), None)

needs_compiler = pytest.mark.skipif(
    find_cxx() is None or find_ninja() is None, reason="needs a C++ compiler and ninja"
)


# -- architectures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("8.0;9.0+PTX", ("sm_80", "sm_90", "compute_90")),
        ("sm_90 75,8.6", ("sm_75", "sm_86", "sm_90")),
        ("Ampere Hopper+PTX", ("sm_80", "sm_86", "sm_90", "compute_90")),
        ("compute_80,12.0,9.0a", ("sm_90a", "sm_120", "compute_80")),
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
        (("sm_90a",), (9, 0), True),
        (("sm_100a",), (10, 3), False),
        (("compute_75",), (9, 0), False),  # runs, but without the instructions chosen for 9.0
        ((), (9, 0), False),
    ],
)
def test_what_runs_on_what(targets, capability, runs) -> None:
    assert covers(targets, capability) is runs


def test_targets_for_the_gpus_at_hand() -> None:
    assert targets_for([(9, 0), (8, 0), (9, 0)], KNOWN) == ("sm_80", "sm_90")
    assert targets_for([(8, 7)], KNOWN) == ("sm_86",)  # nvcc does not know it, its major version
    assert targets_for([(12, 0)], KNOWN) == ("compute_90",)  # newer than nvcc: the driver compiles
    with pytest.raises(ExtensionError, match=r"capability 7\.0"):
        targets_for([(7, 0)], KNOWN)


def test_targets_for_gpus_elsewhere() -> None:
    assert ahead_targets(KNOWN) == (*KNOWN[:5], "compute_90")
    assert ahead_targets(KNOWN[:2]) == ("sm_75", "sm_80", "compute_80")
    assert listed_targets("", KNOWN) == ahead_targets(KNOWN)
    # Lists made for many programs name more than the kernels or nvcc know.
    assert listed_targets("5.2 7.0 8.0 12.0+PTX", KNOWN) == ("sm_80",)
    with pytest.raises(ExtensionError, match=r"TORCH_CUDA_ARCH_LIST=7\.0 holds nothing"):
        listed_targets("7.0", KNOWN)


# -- tools ----------------------------------------------------------------------------------------


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def toolkit(home: Path, release: str) -> Path:
    """Something that answers as nvcc does; its folders are where it says."""
    for folder in ("include", "lib"):
        (home / folder).mkdir(parents=True)
    dryrun = f"""
#$ _HERE_={home}/bin
#$ INCLUDES="-I{home}/bin/../include" "-I/usr/include"
#$ LIBRARIES=  "-L{home}/lib/stubs" "-L{home}/lib"
"""
    return program(
        home / "bin/nvcc",
        f"""case "$1" in
--version) echo "Cuda compilation tools, release {release}, V{release}.1" ;;
--dryrun) cat >&2 <<'END'{dryrun}END
;;
--list-gpu-code) echo sm_80; echo sm_90 ;;
--list-gpu-arch) echo compute_80; echo compute_90 ;;
esac""",
    )


@pytest.fixture
def no_toolkits(monkeypatch, tmp_path: Path) -> Iterator[None]:
    """As if there were none but those a test makes and puts on the path."""
    kept = toolchain._nvcc_paths
    toolchain._find_nvcc.cache_clear()
    monkeypatch.setattr(
        toolchain,
        "_nvcc_paths",
        lambda: (path for path in kept() if path.startswith(str(tmp_path))),
    )
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    yield
    toolchain._find_nvcc.cache_clear()


@pytest.mark.usefixtures("no_toolkits")
def test_the_real_nvcc_is_found_behind_a_script(monkeypatch, tmp_path: Path) -> None:
    real = toolkit(tmp_path / "cuda-13.0", "13.0")
    wrapper = program(tmp_path / "bin/nvcc", f'exec {real} "$@"')
    monkeypatch.setenv("PATH", str(wrapper.parent), prepend=":")
    nvcc = toolchain.find_nvcc("13.2")
    assert nvcc is not None
    assert nvcc.command == (str(real),) and nvcc.version == "13.0"
    assert nvcc.include == (str(tmp_path / "cuda-13.0/include"),)
    assert nvcc.libraries == (str(tmp_path / "cuda-13.0/lib"),)
    assert nvcc.targets == ("sm_80", "sm_90", "compute_80", "compute_90")


@pytest.mark.usefixtures("no_toolkits")
def test_of_several_the_nvcc_that_fits_pytorch_is_taken(monkeypatch, tmp_path: Path) -> None:
    old, new = toolkit(tmp_path / "old", "11.8"), toolkit(tmp_path / "new", "12.4")
    monkeypatch.setenv("CUDA_HOME", str(old.parent.parent))
    monkeypatch.setenv("PATH", str(new.parent), prepend=":")
    assert toolchain.find_nvcc("12.8").command == (str(new),)
    assert toolchain.find_nvcc("11.8").command == (str(old),)
    with pytest.raises(ExtensionError, match=r"CUDA 11\.8 and PyTorch of CUDA 13\.2") as caught:
        find_toolchain("13.2")
    assert caught.value.kind == "version"


@pytest.mark.usefixtures("no_toolkits")
def test_a_missing_tool_is_named(monkeypatch, tmp_path: Path) -> None:
    def reason(cuda: str | None) -> tuple[str, str]:
        with pytest.raises(ExtensionError) as caught:
            find_toolchain(cuda)
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
    found = find_toolchain(None)
    assert found.cxx == Tool((str(cxx),), "c++ 12")
    assert found.ninja == Tool((str(ninja),), "1.13.0") and found.nvcc is None
    monkeypatch.setenv("CXX", f"{cxx} -m64")
    assert find_toolchain(None).cxx.command == (str(cxx), "-m64")


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
            [source], work / "lib.so", find_toolchain(None), (),
            log=tmp_path / "log", output=heard.append,
        )  # fmt: skip
    assert caught.value.kind == "compile" and caught.value.log == str(tmp_path / "log")
    assert "".join(heard) == (tmp_path / "log").read_text() and "-c " in "".join(heard)


def test_a_build_without_end_is_stopped(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    # What ninja starts has to go as well.
    ninja = program(tmp_path / "ninja", f"(while sleep 0.05; do touch {alive}; done) & wait")
    tools = Toolchain(TOOLS.cxx, Tool((str(ninja),), "1"), None)
    steps: list[tuple[str, float]] = []
    with pytest.raises(ExtensionError, match="not compiled after 1 s") as caught:
        compile_library(
            [tmp_path / "op.cpp"], tmp_path / "lib.so", tools, (),
            log=tmp_path / "log", timeout=1.2, progress=lambda *step: steps.append(step),
        )  # fmt: skip
    assert caught.value.kind == "timeout"
    assert steps[0] == (compiling.COMPILING, 0.0) and steps[-1][1] >= 1
    alive.unlink(missing_ok=True)
    time.sleep(0.2)
    assert not alive.exists()


@needs_compiler
def test_a_stand_in_is_compiled_loaded_and_found_again(tmp_path: Path) -> None:
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
    library = Extension(sources, cache=tmp_path / "cache").load()
    assert library.fresh and library.targets == ()
    assert torch.ops.fmupsample_stand_in.twice(21) == 42
    again = Extension(sources, cache=tmp_path / "cache", compiler=never)
    assert again.find().path == library.path
    assert {path.name for path in library.path.parent.iterdir()} == {
        "build.json", "fmupsample_cuda.so",
    }  # fmt: skip


# -- the cache ------------------------------------------------------------------------------------


class Compiler:
    """Writes a library without compiling, or fails, or takes its time."""

    def __init__(self, error: BaseException | None = None, seconds: float = 0.0) -> None:
        self.error, self.seconds, self.calls = error, seconds, 0

    def __call__(self, sources, target, toolchain, targets, *, log, **options) -> None:
        self.calls += 1
        time.sleep(self.seconds)
        Path(log).write_text("what the compilers said")
        target.with_name("x.o").write_text("object")
        target.write_text("half")
        if self.error is not None:
            raise self.error
        target.write_text("a whole library")


def never(*_arguments, **_options) -> None:
    raise AssertionError("compiled once more")


def broken(log: str = "") -> ExtensionError:
    return ExtensionError(
        "the CUDA extension does not compile: op.cpp:1: error: no", "compile", log
    )


@pytest.fixture
def sources(tmp_path: Path, monkeypatch) -> Path:
    """A source folder, on a machine that has the tools."""
    monkeypatch.setattr(extension, "find_toolchain", lambda cuda: TOOLS)
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "op.cpp").write_text("int x;\n")
    return folder


@pytest.fixture
def make(sources: Path, tmp_path: Path):
    """``make(compiler)``: an extension as a new process would see it; nothing is really loaded."""

    def extension_of(compiler=never) -> Extension:
        made = Extension(
            sources, cache=tmp_path / "cache", package=tmp_path / "package", compiler=compiler
        )
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
    assert sorted(p.name for p in made.path.parent.parent.iterdir()) == [
        ".lock", made.path.parent.name,
    ]  # fmt: skip


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
    assert make().find([(8, 6), (9, 0)]).path == built.path
    assert make().find([(7, 5)]) is None
    assert make().find([(6, 1), (12, 0)]).path == built.path  # 6.1 uses plain PyTorch anyway


def test_a_damaged_library_is_not_used(make) -> None:
    built = make(Compiler()).build(())
    built.path.write_text("a who")
    assert make().find() is None
    assert make(Compiler()).load().path.read_text() == "a whole library"


@pytest.mark.parametrize("place", ["cache", "folder", "library"])
def test_a_library_that_others_can_write_is_not_loaded(make, place: str) -> None:
    built = make(Compiler()).build(())
    {"library": built.path, "folder": built.path.parent, "cache": built.path.parents[1]}[
        place
    ].chmod(0o777)
    assert make().find() is None
    again = make(Compiler()).build(())
    # What is inside a cache that was open, and is our own, is still ours once it is closed.
    assert again.fresh or place == "cache"
    assert make().find().path == again.path
    assert again.path.parents[1].stat().st_mode & 0o777 == 0o700


def test_the_log_of_a_build_into_the_package_cannot_be_planted(make, tmp_path, monkeypatch) -> None:
    logs = []

    def compiler(_sources, target: Path, *_arguments, log: Path, **_options) -> None:
        logs.append(log)
        assert log.parent.stat().st_mode & 0o777 == 0o700
        target.write_text("a whole library")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for _ in range(2):
        make(compiler).build_into(tmp_path / "package/_cuda.so", ())
    assert logs[0] != logs[1] and not logs[0].parent.exists()


def test_what_a_killed_build_left_is_not_used_and_goes(make, tmp_path: Path) -> None:
    left = tmp_path / "cache/.build-abc/objects"
    left.mkdir(parents=True)
    (left / "fmupsample_cuda.so").write_text("half")
    assert make().find() is None
    make(Compiler()).load()
    assert not left.parent.exists()


def test_an_interrupted_build_leaves_nothing(make, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(Compiler(KeyboardInterrupt())).load()
    assert not list((tmp_path / "cache").glob("*/*")) and make().find() is None
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
    assert compiler.calls == 1 and waits == [WAITING]
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
    assert "\n" not in str(caught.value) and len(make().failures()) == 1
    assert list((tmp_path / "cache").glob("*.log"))  # what it names is there
    # `fmupsample build` does not care, and what worked is forgotten.
    assert make(Compiler()).build(()).fresh
    assert not make().failures() and not list((tmp_path / "cache").glob("*.log"))


def test_other_tools_or_sources_are_tried(make, sources: Path, monkeypatch) -> None:
    with pytest.raises(ExtensionError):
        make(Compiler(broken())).load()
    other = Toolchain(Tool(("g++",), "g++ 2"), TOOLS.ninja, None)
    with monkeypatch.context() as context:
        context.setattr(extension, "find_toolchain", lambda cuda: other)
        assert make(Compiler()).load().fresh
    with pytest.raises(ExtensionError):
        make(Compiler(broken())).build((), force=True)
    (sources / "op.cpp").write_text("int mended;\n")
    assert make(Compiler()).load().fresh


def test_a_missing_tool_is_not_remembered(make, monkeypatch) -> None:
    def missing(cuda):
        raise ExtensionError("ninja was not found", "ninja")

    with monkeypatch.context() as context:
        context.setattr(extension, "find_toolchain", missing)
        with pytest.raises(ExtensionError, match="ninja"):
            make().load()
    assert make(Compiler()).load().fresh


def test_a_cache_that_cannot_be_written(make, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file is in the way")
    with pytest.raises(ExtensionError, match=r"cannot write to .*FMUPSAMPLE_CACHE") as caught:
        make().load()
    assert caught.value.kind == "cache"


def test_a_library_that_does_not_load_is_remembered(make, sources: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(ExtensionError, match="does not load") as caught:
        Extension(sources, cache=cache, package=tmp_path, compiler=Compiler()).load()
    assert caught.value.kind == "load"
    with pytest.raises(ExtensionError, match=r"does not load.*tries again"):
        make().load()
    assert make(Compiler()).build(()).fresh


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


def test_nothing_is_left_of_a_failed_build_into_the_package(make, tmp_path: Path) -> None:
    with pytest.raises(ExtensionError):
        make(Compiler(broken())).build_into(tmp_path / "package/_cuda.so", ("sm_90",))
    assert not list(tmp_path.glob("package/*"))
