"""Writing in a thread of its own, while the next picture is computed."""

from __future__ import annotations

import contextlib
import errno
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fmupsample.atomic import sync, temporary_for
from fmupsample.errors import FmupsampleError, OutputError
from fmupsample.finite import check_finite
from fmupsample.images.find import printable
from fmupsample.threads import compute_alone
from fmupsample.writers.formats import TensorFile
from fmupsample.writers.manifest import Manifest, Record

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
class Output:
    """One file to be written."""

    path: Path
    kind: Callable[..., TensorFile]
    shape: tuple[int, ...]
    dtype: torch.dtype
    meta: dict[str, str]
    record: Record  # for the manifest; status and bytes are filled in here


# What becomes of a file that is whole, and still has its temporary name: it goes to where `output`
# says, and the record learns how large it is. The manifest hears of it afterwards.
Keep = Callable[[Path, Output, Record], None]


class BackgroundWriter:
    """Writes maps slice by slice in one thread; used by one other thread.

    ``begin(output)``, ``add(slice)`` ..., ``end(seconds)``; ``finished()`` gives the records of
    what is done by now. A picture that cannot be written becomes a ``failed`` record; a disk that
    is full, or gone, ends everything with an OutputError at the next call.

    Args:
        keep: where finished files go; default: under the name of the output.
    """

    def __init__(self, manifest: Manifest, keep: Keep | None = None, *, depth: int = 2) -> None:
        self._manifest = manifest
        self._keep, self._named = keep or self._rename, keep is None
        self._jobs: queue.Queue[Output | Tensor | float | str | None] = queue.Queue(depth)
        self._done: queue.SimpleQueue[Record] = queue.SimpleQueue()
        self._fatal: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def begin(self, output: Output) -> None:
        self._put(output)

    def add(self, rows: Tensor) -> None:
        """The next channels, ``[c, H, W]`` on the CPU, in the dtype of the output."""
        self._put(rows)

    def end(self, seconds: float) -> None:
        """All channels are in; ``seconds`` goes into the record."""
        self._put(seconds)

    def cancel(self, error: str) -> None:
        """The map cannot be completed: no file, a ``failed`` record."""
        self._put(error)

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
        """Stop at once: the file in work is removed, finished ones stay."""
        self._stop.set()
        self._thread.join(timeout=30)
        self._fatal = None
        return self.finished()

    def _check(self) -> None:
        error = self._fatal
        if isinstance(error, OSError):
            raise OutputError(_sentence(error)) from error
        if error is not None:
            raise error

    def _put(self, job: Output | Tensor | float | str | None) -> None:
        while True:
            self._check()
            try:
                return self._jobs.put(job, timeout=0.1)
            except queue.Full:
                continue

    def _get(self) -> Output | Tensor | float | str | None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Empty):
                return self._jobs.get(timeout=0.1)
        return None

    def _run(self) -> None:
        try:
            compute_alone()
            while isinstance(job := self._get(), Output):
                self._write(job)
        except BaseException as error:
            self._fatal = error

    def _rename(self, temporary: Path, output: Output, record: Record) -> None:
        record["bytes"] = temporary.stat().st_size
        sync(temporary)
        temporary.replace(output.path)

    def _write(self, output: Output) -> None:
        """One file, from its ``begin`` to its ``end``."""
        temporary = temporary_for(output.path)
        file: TensorFile | None = None
        failure: OSError | None = None
        try:
            try:
                output.path.parent.mkdir(parents=True, exist_ok=True)
                if self._named:
                    self._manifest.expect(output.record)
                file = output.kind(temporary, output.shape, output.dtype, output.meta)
            except OSError as error:
                failure = _only_this(error)
            reason = ""
            while isinstance(job := self._get(), Tensor):
                if failure is None and file is not None and not reason:
                    try:
                        file.append(check_finite(job, output.record["source"], "the upsampled map"))
                    except FmupsampleError as error:
                        reason = str(error)
            if not isinstance(job, float | str):  # stopped
                return
            record = dict(output.record)
            reason = job if isinstance(job, str) else reason
            if failure is None and file is not None and not reason:
                file.close()
                try:
                    record["seconds"] = round(job, 4)
                    self._keep(temporary, output, record)
                except OSError as error:
                    failure = _only_this(error)
            if failure is not None:
                reason = f"{printable(output.path)} cannot be written: {failure.strerror}"
            if reason:
                record = {**output.record, "status": "failed", "output": None, "error": reason}
            else:
                record["status"] = "ok"
            self._manifest.append(record)
            self._done.put(record)
        finally:
            if file is not None:
                file.discard()
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _only_this(error: OSError) -> OSError:
    if error.errno not in _OF_ONE_FILE:
        raise error
    return error


def _sentence(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"the disk is full ({error.strerror}); what is finished is kept: free some space, or "
            "take --dtype fp16, --pca 32 or a smaller --output-size, and run the command again"
        )
    return f"results cannot be written any more: {error}; what is finished is kept"
