"""The compiled CUDA extension: where it is found, and how it comes to be.

Looked for in this order:

1. in the package itself, compiled when the package was installed (``FMUPSAMPLE_BUILD_CUDA=1``);
2. in ``extensions/`` of the cache folder, compiled earlier;
3. compiled now, for the GPUs of this machine, into the cache folder.

The library registers its operators as ``torch.ops.fmupsample_cuda``; it is loaded, not imported,
and does not depend on Python. What it does depend on is in its key: the sources, the compiler's
flags, and the PyTorch it was compiled for. A build that failed is remembered under the same key, so
that the next process says why in one line instead of failing for a minute again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fmupsample.atomic import replacing
from fmupsample.errors import ExtensionError
from fmupsample.folders import cache_folder
from fmupsample.ops.building import compiling
from fmupsample.ops.building.architectures import OLDEST, Capability, covers, show, targets_for
from fmupsample.ops.building.compiling import (
    HEADERS,
    Progress,
    compile_library,
    has_cuda,
    source_files,
)
from fmupsample.ops.building.library import Library, read_json, read_library
from fmupsample.ops.building.toolchain import Toolchain, find_toolchain

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PACKAGE = Path(__file__).parents[1]  # fmupsample.ops
SOURCES = PACKAGE / "csrc"
# A build takes about a minute; one that takes this long will not end.
TIMEOUT = 30 * 60.0

WAITING = "waiting for another process that compiles the CUDA extension"
_LIBRARY = "fmupsample_cuda.so"
_OURS_ALONE = 0o700
_FACTS = "build.json"


class Extension:
    """One extension: its sources, its cache, and whether it is loaded. Safe under threads.

    Args:
        sources: folder with the ``.cu``, ``.cpp`` and header files.
        cache: folder for what is compiled; default ``extensions`` in the cache folder.
        package: folder in which a library compiled at installation would be.
        compiler: what compiles, see :func:`.compiling.compile_library`.
    """

    def __init__(
        self,
        sources: Path = SOURCES,
        *,
        cache: Path | None = None,
        package: Path = PACKAGE,
        compiler: Callable[..., None] = compile_library,
    ) -> None:
        self.folder = sources
        self.package = package
        self.compiler = compiler
        self._cache = cache
        self._mutex = threading.Lock()
        self._loaded: Library | None = None
        self._failure: ExtensionError | None = None

    @property
    def cache(self) -> Path:
        return self._cache or cache_folder() / "extensions"

    @property
    def loaded(self) -> Library | None:
        """The library that this process uses."""
        return self._loaded

    # -- use ----------------------------------------------------------------------------------

    def load(self, progress: Progress | None = None) -> Library:
        """Have the operators registered: find the library, or compile it, and load it.

        The outcome stands for the life of the process, a failure as well.

        Raises:
            ExtensionError: it cannot be had, and why.
        """
        if self._loaded is not None:
            return self._loaded
        with self._mutex:
            if self._failure is not None:
                failure = self._failure
                raise ExtensionError(str(failure), failure.kind, failure.log)
            if self._loaded is None:
                try:
                    gpus = capabilities()
                    library = self.find(gpus)
                    if library is None:
                        library = self.build(self.needed(gpus), retry=False, progress=progress)
                    self.open(library)
                except ExtensionError as error:
                    self._failure = error
                    raise
                self._loaded = library
            return self._loaded

    def check(self) -> None:
        """Raises ExtensionError where this installation can never use the extension."""
        sources = source_files(self.folder)
        if not sources:
            raise ExtensionError("this installation has no CUDA sources", "absent")
        if os.name != "posix":
            raise ExtensionError(f"it is not made for {platform.system()}", "system")
        if has_cuda(sources) and torch.version.cuda is None:
            kind = "for ROCm" if torch.version.hip else "without CUDA"
            raise ExtensionError(f"PyTorch {torch.__version__} is built {kind}", "torch")

    def needed(self, gpus: Sequence[Capability]) -> tuple[str, ...]:
        """The targets to compile for, for these GPUs; those too old for the kernels are left out.

        Raises:
            ExtensionError: nothing is left, or nvcc is missing.
        """
        self.check()
        if not has_cuda(source_files(self.folder)):
            return ()
        young = [gpu for gpu in gpus if gpu >= OLDEST]
        if not young:
            found = ", ".join(map(show, gpus)) or "none"
            raise ExtensionError(
                f"it needs a GPU of compute capability {show(OLDEST)}, found {found}", "gpu"
            )
        nvcc = self.toolchain().nvcc
        assert nvcc is not None
        return targets_for(young, nvcc.targets)

    def toolchain(self) -> Toolchain:
        """Raises ExtensionError where a tool is missing."""
        return find_toolchain(torch.version.cuda if has_cuda(source_files(self.folder)) else None)

    # -- what is there --------------------------------------------------------------------------

    def key(self) -> str:
        """16 hex digits over all that decides the library, but for the architectures."""
        whole = hashlib.sha256()
        facts = [
            torch.__version__, torch.version.cuda, platform.system(), platform.machine(),
            *compiling.common_flags(), *compiling.nvcc_flags(),
        ]  # fmt: skip
        whole.update("\n".join(map(str, facts)).encode())
        for path in sorted(self.folder.glob("*")):
            if path.suffix in (".cpp", ".cu", *HEADERS):
                whole.update(f"\n{path.name} {path.stat().st_size}\n".encode())
                whole.update(path.read_bytes())
        return whole.hexdigest()[:16]

    def find(self, gpus: Sequence[Capability] = ()) -> Library | None:
        """A library that is there and runs on all ``gpus`` that the kernels can use."""
        library, _ = self.packaged(gpus)
        return library or self.cached(gpus)

    def packaged(self, gpus: Sequence[Capability] = ()) -> tuple[Library | None, str | None]:
        """The library in the package, or why the one that is there is not used."""
        for path in sorted(self.package.glob("_cuda*.so")):
            library = read_library(path, path.with_suffix(".json"))
            if library is None:
                return None, f"{path} is damaged"
            if library.torch != torch.__version__:
                return None, (
                    f"{path} was compiled for PyTorch {library.torch}, this is {torch.__version__}"
                )
            if library.key != self.key():
                return None, f"{path} was compiled from other sources, or for another CUDA"
            if not _serves(library, gpus):
                return None, f"{path} holds {', '.join(library.targets)}, not for this GPU"
            return library, None
        return None, None

    def cached(self, gpus: Sequence[Capability] = ()) -> Library | None:
        """The library in the cache; of several, the one for the most architectures."""
        found = [
            library
            for folder in self.cache.glob(f"{self.key()}-*")
            if _is_private(self.cache, folder, folder / _LIBRARY)
            and (library := read_library(folder / _LIBRARY, folder / _FACTS))
            and _serves(library, gpus)
        ]
        return max(found, key=lambda library: len(library.targets), default=None)

    def remembered(self, targets: Sequence[str]) -> ExtensionError | None:
        """Why an earlier build for ``targets`` with the same tools failed."""
        return self._failure_in(self._record(targets))

    def failures(self) -> list[ExtensionError]:
        """The same, for whatever targets."""
        records = sorted(self.cache.glob(f"{self.key()}-*.failed.json"))
        return [failure for record in records if (failure := self._failure_in(record))]

    def _failure_in(self, record: Path) -> ExtensionError | None:
        known = read_json(record)
        if not known or known.get("tools") != self.toolchain().identity:
            return None
        reason = f"{known.get('reason')} (an earlier build; `fmupsample build` tries again)"
        return ExtensionError(reason, str(known.get("kind")), known.get("log"))

    # -- building -------------------------------------------------------------------------------

    def build(
        self,
        targets: Sequence[str],
        *,
        force: bool = False,
        retry: bool = True,
        jobs: int | None = None,
        timeout: float = TIMEOUT,
        progress: Progress | None = None,
        output: Callable[[str], None] | None = None,
    ) -> Library:
        """Compile for ``targets`` into the cache, unless that is there already.

        Only one process compiles at a time; others wait for it and use what it made.

        Args:
            force: compile even if it is there.
            retry: compile even if that failed before.
            output: is told what the compilers say.

        Raises:
            ExtensionError: it did not work; the reason is remembered if the compilers gave it.
        """
        self.check()
        toolchain = self.toolchain()
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            self.cache.chmod(_OURS_ALONE)
            with _locked(self.cache / ".lock", progress) as alone:
                # Another process may have been here while this one waited.
                library = None if force else self._exact(targets)
                if library is not None:
                    return library
                if not retry and (failure := self.remembered(targets)):
                    raise failure
                if alone:
                    for leftover in self.cache.glob(".build-*"):  # of processes that were killed
                        shutil.rmtree(leftover, ignore_errors=True)
                return self._build(toolchain, targets, jobs, timeout, progress, output)
        except OSError as error:
            raise ExtensionError(
                f"cannot write to {self.cache} ({error.strerror or error}); FMUPSAMPLE_CACHE "
                "names another cache folder",
                "cache",
            ) from error

    def _build(self, toolchain, targets, jobs, timeout, progress, output) -> Library:
        """In a folder of its own, which gets its name when it is whole."""
        log, record = self._record(targets, ".log"), self._record(targets)
        work = Path(tempfile.mkdtemp(prefix=".build-", dir=self.cache))
        began = time.monotonic()
        try:
            objects = work / "objects"
            objects.mkdir()
            self.compiler(
                source_files(self.folder), objects / _LIBRARY, toolchain, targets,
                log=log, jobs=jobs, timeout=timeout, progress=progress, output=output,
            )  # fmt: skip
            whole = work / "whole"
            whole.mkdir()
            (objects / _LIBRARY).replace(whole / _LIBRARY)
            seconds = time.monotonic() - began
            made = Library(whole / _LIBRARY, tuple(targets), self.key(), torch.__version__, seconds)
            made.save_facts(whole / _FACTS)
            for path in (whole, whole / _LIBRARY):
                path.chmod(_OURS_ALONE)
            folder = self._place(targets)
            if folder.exists():
                folder.rename(work / "before")
            whole.rename(folder)
        except ExtensionError as error:
            if error.kind in ("compile", "timeout"):
                self._remember(record, error, toolchain)
            raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
        for path in (log, record):
            path.unlink(missing_ok=True)
        return Library(folder / _LIBRARY, made.targets, made.key, made.torch, seconds, fresh=True)

    def build_into(self, path: Path, targets: Sequence[str], **options: Any) -> Library:
        """Compile into the library ``path``, ``_cuda*.so`` of a package, facts beside it.

        Args:
            options: ``jobs``, ``progress``, ``output`` as for :meth:`build`.

        Raises:
            ExtensionError: it did not work. Nothing is remembered.
        """
        self.check()
        toolchain = self.toolchain()
        began = time.monotonic()
        log = Path(tempfile.mkdtemp(prefix="fmupsample-"), "build.log")  # nobody else's to plant
        with tempfile.TemporaryDirectory(prefix="fmupsample-") as work:
            made = Path(work, _LIBRARY)
            self.compiler(
                source_files(self.folder), made, toolchain, targets,
                log=log, timeout=TIMEOUT, **options,
            )  # fmt: skip
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                shutil.copyfile(made, temporary)
        shutil.rmtree(log.parent, ignore_errors=True)
        seconds = time.monotonic() - began
        library = Library(path, tuple(targets), self.key(), torch.__version__, seconds, fresh=True)
        library.save_facts(path.with_suffix(".json"))
        return library

    def open(self, library: Library) -> None:
        """Load ``library``, which registers its operators; once in a process.

        Raises:
            ExtensionError: it does not load.
        """
        try:
            torch.ops.load_library(str(library.path))
        except (OSError, RuntimeError) as error:
            said = str(error.__cause__ or error).strip() or type(error).__name__
            first = said.splitlines()[0].removeprefix(f"{library.path}: ")
            failure = ExtensionError(f"{library.path} does not load: {first}", "load")
            if library.path.is_relative_to(self.cache):
                # The next process says so as well, and `fmupsample build` compiles it anew.
                with contextlib.suppress(OSError, ExtensionError):
                    self._remember(self._record(library.targets), failure, self.toolchain())
                    shutil.rmtree(library.path.parent, ignore_errors=True)
            raise failure from error

    def _exact(self, targets: Sequence[str]) -> Library | None:
        folder = self._place(targets)
        if not _is_private(self.cache, folder, folder / _LIBRARY):
            return None
        return read_library(folder / _LIBRARY, folder / _FACTS)

    def _place(self, targets: Sequence[str]) -> Path:
        return self.cache / f"{self.key()}-{'-'.join(targets) or 'host'}"

    def _record(self, targets: Sequence[str], suffix: str = ".failed.json") -> Path:
        place = self._place(targets)
        return place.with_name(place.name + suffix)

    def _remember(self, record: Path, error: ExtensionError, toolchain: Toolchain) -> None:
        facts = {
            "reason": str(error),
            "kind": error.kind,
            "log": error.log,
            "tools": toolchain.identity,
        }
        with replacing(record) as temporary:
            temporary.write_text(json.dumps(facts, indent=2) + "\n")


def capabilities() -> list[Capability]:
    """Of every GPU that this process sees."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]


def _is_private(*paths: Path) -> bool:
    """Whether all are there, and nobody but this user, or root, could have written them.

    What is loaded runs: a library that others can replace is not loaded.
    """
    if os.name != "posix":
        return all(path.exists() for path in paths)
    try:
        found = [path.stat() for path in paths]
    except OSError:
        return False
    return all(s.st_uid in (os.geteuid(), 0) and not s.st_mode & 0o022 for s in found)


def _serves(library: Library, gpus: Sequence[Capability]) -> bool:
    return all(covers(library.targets, gpu) for gpu in gpus if gpu >= OLDEST)


@contextlib.contextmanager
def _locked(path: Path, progress: Progress | None) -> Iterator[bool]:
    """Hold the lock file ``path``, waiting for it; it is free when its process has ended.

    On systems and network disks without locks nobody waits: then it yields False.
    """
    with path.open("w") as handle:
        held = False
        began, told = time.monotonic(), 0.0
        while fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
                break
            except BlockingIOError:
                now = time.monotonic()
                if progress and now - told >= 1:
                    told = now
                    progress(WAITING, now - began)
                time.sleep(0.1)
            except OSError:
                break
        yield held


EXTENSION = Extension()
