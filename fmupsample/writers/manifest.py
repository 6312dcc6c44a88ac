"""``manifest.jsonl``: what became of each picture, one JSON object a line.

While a run lasts, lines are only appended, each in one write: a run that is killed leaves at most
one torn line at the end, which the next run drops. Before a result takes its final name, a line
with status ``pending`` says so: a file that no line names is not ours and is never overwritten.
At the end the file is rewritten, atomically, with one line a picture. A failure takes nothing away:
where a picture has a result of the same options, that stays the last word about it, and one of
other options is named by the record of the failure (``earlier``).

Where several processes share a run, the first appends here and each other to a file of its own in
the hidden folder ``.manifest``. Who opens a manifest reads those too, and merges them before it
writes a line.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from pathlib import Path, PurePosixPath
from typing import Any

from fmupsample.atomic import replacing
from fmupsample.errors import OutputError, UsageError
from fmupsample.images.find import printable

NAME = "manifest.jsonl"
_PARTS = ".manifest"
Record = dict[str, Any]


class Manifest:
    """The manifest of an output folder. ``append`` may be called from any thread.

    Attributes:
        records: the latest record of each picture, by its ``source`` (an absolute path).
    """

    def __init__(self, folder: Path) -> None:
        """Read what is there.

        Raises:
            UsageError: a file of that name that is not such a manifest.
            OutputError: it cannot be read.
        """
        self.path = folder / NAME
        self.records: dict[str, Record] = {}
        self._lock = threading.Lock()
        self._handle: int | None = None
        self._options: dict[str, Any] = {}  # one object for all records that have the same
        self._whole = self._read(self.path)  # bytes up to the end of the last whole line
        self._shared = False  # other processes write parts
        self._parts: list[Path] = []
        self._find_parts()

    def _find_parts(self) -> None:
        self._parts = sorted((self.path.parent / _PARTS).glob("*.jsonl"))
        for part in self._parts:
            self._read(part)

    def _read(self, path: Path) -> int:
        """Add the records in a file; the bytes of its whole lines."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise OutputError(f"cannot read {printable(path)}: {error.strerror}") from error
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            if line.strip():
                record = _parse(line)
                if record is None:
                    raise UsageError(
                        f"{printable(path)} is not a manifest of fmupsample (line {number}): "
                        "choose another output folder, or move that file away"
                    )
                if isinstance(record.get("options"), dict):
                    mark = str(record.get("options_hash"))
                    known = self._options.setdefault(mark, record["options"])
                    if known == record["options"]:
                        record["options"] = known
                self._take(record)
        return whole

    def share(self) -> None:
        """From now on other processes write parts; earlier parts are merged.

        Raises:
            OSError: that cannot be written.
        """
        with self._lock:
            self._open()
            self._shared = True

    def absorb(self) -> dict[str, Record]:
        """The other processes have ended: read their parts, which :meth:`close` will merge.

        Returns:
            Their records, by source.

        Raises:
            OutputError: a part cannot be read.
        """
        with self._lock:
            own, self.records = self.records, {}
            self._find_parts()
            theirs, self.records = self.records, own
            for record in theirs.values():
                self._take(record)
            self._shared = False
        return theirs

    def append(self, record: Record) -> None:
        """Add a line, in one write.

        Raises:
            OSError: it cannot be written.
        """
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self._open()
            view = memoryview(line)
            while view:
                view = view[os.write(self._handle, view) :]
            self._take(record)

    def _take(self, record: Record) -> None:
        """``record`` is the latest about its picture."""
        key = record["source"]
        if record["status"] == "failed" and (before := self.records.get(key)) is not None:
            same = before.get("options_hash") == record.get("options_hash")
            if before["status"] == "ok" and same:
                return
            record = {**record, "earlier": result_of(before), "beside": before.get("beside", [])}
        self.records[key] = record

    def _open(self) -> None:
        if self._handle is not None:
            return
        if self._parts:
            self._rewrite()
        self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._handle, self._whole)

    def _rewrite(self) -> None:
        """One line a picture, sorted by output, and no parts."""
        ordered = sorted(self.records.values(), key=lambda r: (r.get("output") or "", r["source"]))
        with replacing(self.path) as temporary:
            lines = (json.dumps(r, separators=(",", ":")).encode() + b"\n" for r in ordered)
            self._whole = temporary.write_bytes(b"".join(lines))
        for part in self._parts:
            part.unlink(missing_ok=True)
        self._parts = []
        with contextlib.suppress(OSError):
            (self.path.parent / _PARTS).rmdir()

    def close(self, *, compact: bool = True) -> None:
        """Close the file; ``compact``: rewrite it with one line a picture, sorted by output."""
        with self._lock:
            if self._handle is None and not self._parts:
                return
            if self._handle is not None:
                os.close(self._handle)
                self._handle = None
            if not compact or self._shared:
                return
            # On a full disk the longer form stays, which says the same.
            with contextlib.suppress(OSError):
                self._rewrite()


class ManifestPart(Manifest):
    """What one process adds beside the one that leads the run; see :meth:`Manifest.share`."""

    def __init__(self, folder: Path, name: str) -> None:
        """Make the file.

        Args:
            name: of this process among those of the run.

        Raises:
            OutputError: it cannot be made.
        """
        path = folder / _PARTS / f"{name}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        except OSError as error:
            raise OutputError(f"cannot write {printable(path)}: {error.strerror}") from error
        super().__init__(path.parent)  # where no manifest is
        self.path = path

    def close(self, *, compact: bool = True) -> None:
        """Close the file; nothing is rewritten."""
        super().close(compact=False)


def result_of(record: Record) -> str | None:
    """The file that a picture has, of this run or, after a failure, of an earlier one."""
    return record.get("output") or record.get("earlier")


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("source"), str):
        return None
    beside = record.get("beside", [])
    if not isinstance(beside, list) or not all(_inside(name) for name in beside):
        return None
    pictures = record.get("pictures", {})  # of visualize
    if not isinstance(pictures, dict) or not all(isinstance(p, dict) for p in pictures.values()):
        return None
    for name in (record.get("output"), record.get("earlier")):
        if name is not None and not _inside(name):
            return None
    return record if isinstance(record.get("status"), str) else None


def _inside(name: object) -> bool:
    """Whether it names a file below the output folder: others are not removed or replaced."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    if ".." not in name and name[0] != "/":
        return True  # nearly all, of perhaps a million
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
