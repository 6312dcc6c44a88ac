"""The compiled CUDA extension: where it is found, and how it comes to be.

Looked for in this order:

1. in the package itself, compiled when the package was installed (``FMUPSAMPLE_BUILD_CUDA=1``);
2. in ``extensions/`` of the cache folder, compiled earlier;
3. compiled now, for the GPUs of this machine, into the cache folder.

The library registers its operators as ``torch.ops.fmupsample_cuda`` and serves every Python. What
it depends on is in its key: the sources, the flags, and the PyTorch it was compiled for. A build
that failed is remembered under the same key, so that the next process says why in one line instead
of failing for a minute again.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fmupsample.errors import ExtensionError
from fmupsample.folders import cache_folder
from fmupsample.ops.building import architectures, cache, compiling
from fmupsample.ops.building.architectures import Capability
from fmupsample.ops.building.cache import Library
from fmupsample.ops.building.compiling import Progress, Tools

PACKAGE = Path(__file__).parents[1]  # fmupsample.ops
# A build takes about a minute; one that takes this long will not end.
TIMEOUT = 30 * 60.0


class Extension:
    """One extension: its sources, its cache, and whether it is loaded. Safe under threads.

    Args:
        folder: holds the ``.cu``, ``.cpp`` and header files.
        cache: folder for what is compiled; default ``extensions`` in the cache folder.
        package: folder in which a library compiled at installation would be.
    """

    def __init__(
        self, folder: Path = PACKAGE / "csrc", cache: Path | None = None, package: Path = PACKAGE
    ) -> None:
        self.folder, self.package, self._cache = folder, package, cache
        self.sources = sorted(p for p in folder.glob("*") if p.suffix in (".cpp", ".cu"))
        self.has_cuda = any(path.suffix == ".cu" for path in self.sources)
        self.loaded: Library | None = None  # what this process uses
        self._failure: ExtensionError | None = None
        self._mutex = threading.Lock()

    @property
    def cache(self) -> Path:
        return (self._cache or cache_folder() / "extensions").resolve()

    def load(self, progress: Progress | None = None) -> Library:
        """Have the operators registered: find the library, or compile it, and load it.

        The outcome stands for the life of the process, a failure as well.

        Raises:
            ExtensionError: it cannot be had, and why.
        """
        with self._mutex:
            if self._failure is not None:
                raise ExtensionError(str(self._failure), self._failure.kind, self._failure.log)
            if self.loaded is None:
                try:
                    self.check()
                    gpus = capabilities()
                    library = self.packaged(gpus)[0] or self.cached(gpus)
                    if library is None:
                        library = self.build(self.targets(), retry=False, progress=progress)
                    self.open(library)
                except ExtensionError as error:
                    self._failure = error
                    raise
                self.loaded = library
            return self.loaded

    def check(self) -> None:
        """Raises ExtensionError where this installation can never use the extension."""
        if not self.sources:
            raise ExtensionError("this installation has no CUDA sources", "absent")
        if os.name != "posix":
            raise ExtensionError(f"it is not made for {platform.system()}", "system")
        if self.has_cuda and torch.version.cuda is None:
            kind = "for ROCm" if torch.version.hip else "without CUDA"
            raise ExtensionError(f"PyTorch {torch.__version__} is built {kind}", "torch")

    def tools(self) -> Tools:
        """Raises ExtensionError where a tool is missing."""
        return compiling.required_tools(torch.version.cuda if self.has_cuda else None)

    def targets(self, arch: str = "native") -> tuple[str, ...]:
        """What to compile for, as nvcc names it.

        Args:
            arch: ``"native"``: the GPUs of this machine that are not too old for the kernels;
                ``"listed"``: those of ``$TORCH_CUDA_ARCH_LIST`` that nvcc and the kernels support;
                ``"all"``: the usual ones; else architectures, e.g. ``8.0,9.0+PTX``.

        Raises:
            UsageError: not an architecture, or one that nvcc or the kernels do not support.
            ExtensionError: there is no GPU for ``"native"``, or a tool is missing.
        """
        text = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() if arch == "listed" else arch
        text = architectures.USUAL if text in ("", "all") else text
        asked = architectures.parse_targets(text) if text != "native" else ()
        self.check()
        nvcc = self.tools().nvcc
        if nvcc is None:
            return ()
        known = compiling.known_codes(nvcc)
        if text == "native":
            return architectures.native_targets(capabilities(), known)
        return architectures.supported(asked, known, lenient=arch in ("listed", "all"))

    def key(self) -> str:
        """16 hex digits over all that decides the library, but for the architectures."""
        facts = [torch.__version__, torch.version.cuda, platform.system(), platform.machine()]
        whole = hashlib.sha256("\n".join(map(str, [*facts, *compiling.FLAGS])).encode())
        for path in sorted(self.folder.glob("*")):
            if path.suffix in (".cpp", ".cu", ".cuh", ".h"):
                whole.update(f"\n{path.name} {path.stat().st_size}\n".encode())
                whole.update(path.read_bytes())
        return whole.hexdigest()[:16]

    def packaged(self, gpus: Sequence[Capability] = ()) -> tuple[Library | None, str | None]:
        """The library in the package, or why the one that is there is not used."""
        for path in sorted(self.package.glob("_cuda*.so")):
            library = Library.read(path)
            refused = library.refused(self.key(), gpus) if library else "is damaged"
            return (None, f"{path} {refused}") if refused else (library, None)
        return None, None

    def cached(self, gpus: Sequence[Capability] = ()) -> Library | None:
        """The library in the cache; of several, the one for the most architectures."""
        if not cache.is_private(self.cache):
            return None
        key = self.key()
        paths = filter(cache.is_ours, self.cache.glob(f"{key}-*.so"))
        found = [lib for lib in map(Library.read, paths) if lib and not lib.refused(key, gpus)]
        return max(found, key=lambda library: len(library.targets), default=None)

    def remembered(self, targets: Sequence[str] | None = None) -> ExtensionError | None:
        """Why the last build with these tools failed, if it was for ``targets`` (None: any)."""
        known = cache.read_json(self._record)
        if not known or targets not in (None, tuple(known.get("targets", ()))):
            return None
        if known.get("tools") != self.tools().identity():
            return None
        reason = f"{known.get('reason')} (an earlier build; `fmupsample build` tries again)"
        return ExtensionError(reason, str(known.get("kind")), known.get("log"))

    def build(
        self,
        targets: tuple[str, ...],
        *,
        force: bool = False,
        retry: bool = True,
        progress: Progress | None = None,
        **options: Any,
    ) -> Library:
        """Compile for ``targets`` into the cache, unless that is there already.

        Only one process compiles at a time; others wait for it and use what it made.

        Args:
            force: compile even if it is there.
            retry: compile even if that failed before.
            options: ``jobs`` and ``output`` of :func:`.compiling.compile_library`.

        Raises:
            ExtensionError: it did not work; the reason is remembered if the compilers gave it.
        """
        self.check()
        tools = self.tools()
        path = self.cache / f"{self.key()}-{'-'.join(targets) or 'host'}.so"
        try:
            cache.make_private(self.cache)
            with cache.locked(self.cache / ".lock", progress) as alone:
                # Another process may have been here while this one waited.
                if not force and cache.is_ours(path) and (library := Library.read(path)):
                    return library
                if not retry and (failure := self.remembered(targets)):
                    raise failure
                with cache.work_folder(self.cache, alone=alone) as work:
                    return self._build(path, work, tools, targets, progress=progress, **options)
        except OSError as error:
            reason = f"cannot write to {self.cache} ({error.strerror or error})"
            advice = "FMUPSAMPLE_CACHE names another cache folder"
            raise ExtensionError(f"{reason}; {advice}", "cache") from error

    def _build(
        self, path: Path, work: Path, tools: Tools, targets: tuple[str, ...], **options: Any
    ) -> Library:
        """Compile into the cache, and remember how that ended."""
        log = self._record.with_suffix(".log")
        try:
            library = self._compile(path, work, tools, targets, log=log, **options)
        except ExtensionError as error:
            facts = {"reason": str(error), "kind": error.kind, "log": error.log}
            cache.write_json(self._record, facts | {"targets": targets, "tools": tools.identity()})
            raise
        for old in (log, self._record):
            old.unlink(missing_ok=True)
        return library

    def build_into(self, path: Path, targets: tuple[str, ...], **options: Any) -> Library:
        """Compile into the library ``path``, ``_cuda*.so`` of a package, with facts beside it.

        Args:
            options: ``jobs``, ``progress``, ``output`` of :func:`.compiling.compile_library`.

        Raises:
            ExtensionError: it did not work. Nothing is remembered, but the log is left.
        """
        self.check()
        tools = self.tools()
        work = Path(tempfile.mkdtemp(prefix="fmupsample-"))  # nobody else can plant files in it
        path.parent.mkdir(parents=True, exist_ok=True)
        log = work / "build.log"
        library = self._compile(path, work, tools, targets, log=log, **options)
        shutil.rmtree(work, ignore_errors=True)
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
            again = "`fmupsample build --force` compiles it anew"
            reason = f"{library.path} does not load: {first}; {again}"
            raise ExtensionError(reason, "load") from error

    def _compile(
        self, path: Path, work: Path, tools: Tools, targets: tuple[str, ...], **options: Any
    ) -> Library:
        began = time.monotonic()
        made = compiling.compile_library(
            self.sources, work, tools, targets, timeout=TIMEOUT, **options
        )
        seconds = round(time.monotonic() - began, 1)
        size = made.stat().st_size
        library = Library(path, targets, self.key(), torch.__version__, seconds, size)
        library.write(made)
        return replace(library, fresh=True)

    @property
    def _record(self) -> Path:
        return self.cache / f"{self.key()}.failed.json"


def capabilities() -> list[Capability]:
    """Of every GPU that this process sees."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]


EXTENSION = Extension()
