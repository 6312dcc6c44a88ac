"""Writing in a thread of its own, while the next image is computed."""

from __future__ import annotations

import contextlib
import errno
import queue
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fmupsample.atomic import replacing, temporary_for
from fmupsample.errors import FmupsampleError, OutputError
from fmupsample.finite import check_finite
from fmupsample.formats.files import TensorFile
from fmupsample.images.find import printable
from fmupsample.runs.job import Output
from fmupsample.runs.manifest import Record
from fmupsample.runs.store import Store
from fmupsample.threads import compute_alone

# What can be wrong with one name while the rest of the folder is fine.
_OF_ONE_FILE = {
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.EACCES,
    errno.EPERM,
    errno.EILSEQ,
    errno.EINVAL,
}


@dataclass
class _End:
    """All is in; ``reason``: it cannot be completed."""

    seconds: float = 0.0
    reason: str = ""


class BackgroundWriter:
    """Writes files part by part in one thread; used by one other thread.

    ``begin(output)``, ``add(output, part)`` ..., ``end(output, seconds)``; several outputs may be
    open at once. ``finished()`` gives the records of what is done by now. A result that cannot be
    written becomes a ``failed`` record; a disk that is full, or gone, ends everything with an
    OutputError at the next call.
    """

    def __init__(self, store: Store, *, depth: int = 2) -> None:
        self._store = store
        self._jobs: queue.Queue[tuple[Output, Any] | None] = queue.Queue(depth)
        self._done: queue.SimpleQueue[Record] = queue.SimpleQueue()
        self._open: dict[Output, _Open] = {}
        self._fatal: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def begin(self, output: Output) -> None:
        """Open a file."""
        self._put((output, None))

    def add(self, output: Output, part: Any) -> None:
        """What comes next in it: of a map, channels ``[c, H, W]`` on the CPU, in its dtype."""
        self._put((output, part))

    def end(self, output: Output, seconds: float) -> None:
        """All is in; ``seconds`` goes into the record."""
        self._put((output, _End(seconds)))

    def cancel(self, output: Output, reason: str) -> None:
        """It cannot be completed: no file, a ``failed`` record."""
        self._put((output, _End(reason=reason)))

    def finished(self) -> list[Record]:
        """Records completed since the last call; raises what stopped the thread."""
        self._check()
        records = []
        with contextlib.suppress(queue.Empty):
            while True:
                records.append(self._done.get_nowait())
        return records

    def close(self) -> list[Record]:
        """Wait until everything is written; the records not yet fetched."""
        self._put(None)
        self._thread.join()
        return self.finished()

    def abort(self) -> list[Record]:
        """Stop at once: files in work are removed, finished ones stay."""
        self._stop.set()
        self._thread.join(timeout=30)
        self._fatal = None
        return self.finished()

    def _check(self) -> None:
        error = self._fatal
        if isinstance(error, OSError):
            raise OutputError(_sentence(error, self._store.job.smaller)) from error
        if error is not None:
            raise error

    def _put(self, job: tuple[Output, Any] | None) -> None:
        while True:
            self._check()
            try:
                return self._jobs.put(job, timeout=0.1)
            except queue.Full:
                continue

    def _get(self) -> tuple[Output, Any] | None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Empty):
                return self._jobs.get(timeout=0.1)
        return None

    def _run(self) -> None:
        try:
            compute_alone()
            while (job := self._get()) is not None:
                output, part = job
                if part is None:
                    self._open[output] = _Open(output, self._store)
                elif isinstance(part, _End):
                    record = self._open.pop(output).end(part)
                    self._store.manifest.append(record)
                    self._done.put(record)
                else:
                    self._open[output].add(part)
                del job, part  # what was written is not kept while the next part is waited for
        except BaseException as error:
            self._fatal = error
        finally:
            for file in self._open.values():
                file.discard()


class _Open:
    """A file from its begin to its end; what is wrong with it alone is said at the end."""

    def __init__(self, output: Output, store: Store) -> None:
        self.output, self.store, self.reason = output, store, ""
        self.path = store.path(output.task)
        self.temporary: Path = temporary_for(self.path, output.extension)
        self.file: TensorFile | None = None
        with self._noting():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            store.announce(output)
            self.file = output.kind(self.temporary, output.shape, output.dtype, output.meta)

    def add(self, part: Any) -> None:
        if self.reason or self.file is None:
            return
        with self._noting():
            if isinstance(part, Tensor):
                check_finite(part, self.output.task.source, "the upsampled map")
            self.file.append(part)

    def end(self, how: _End) -> Record:
        """Close it and give it its name; what the manifest says of it."""
        record: Record = {}
        self.reason = how.reason or self.reason
        try:
            if not self.reason and self.file is not None:
                with self._noting():
                    self._write_beside()
                    self.file.close()
                    record = {**self.output.record, "seconds": round(how.seconds, 4)}
                    self.store.keep(self.temporary, self.output, record)
        finally:
            self.discard()
        if self.reason:
            failed = {"status": "failed", "output": None, "error": self.reason}
            return {**self.output.record, **failed}
        return {**record, "status": "ok"}

    def _write_beside(self) -> None:
        task = self.output.task
        for name, draw in zip(task.beside, self.output.beside, strict=True):
            path = self.store.out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_bytes(draw())

    def discard(self) -> None:
        if self.file is not None:
            self.file.discard()
        with contextlib.suppress(OSError):
            self.temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _noting(self):
        try:
            yield
        except OutputError:
            raise
        except FmupsampleError as error:
            self.reason = str(error)
        except OSError as error:
            if error.errno not in _OF_ONE_FILE:
                raise
            self.reason = f"{printable(self.path)} cannot be written: {error.strerror}"


def _sentence(error: OSError, smaller: str) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"the disk is full ({error.strerror}); what is finished is kept: free some space, or "
            f"{smaller}, and run the command again"
        )
    return f"results cannot be written any more: {error}; what is finished is kept"
