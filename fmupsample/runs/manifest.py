"""``manifest.jsonl``: what became of each picture, one JSON object a line.

While a run lasts, lines are only appended, each in one write: a run that is killed leaves at most
one torn line at the end, which the next run drops; after a power failure there may also be zeros in
place of lines, dropped as well. Before a result takes its final name, a line with status
``pending`` says so, and is on the disk: a file that no line names is not ours and is never
overwritten. Such lines are written and flushed for many results at once (:meth:`Manifest.expect`).
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
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from fmupsample.atomic import replacing, sync
from fmupsample.errors import OutputError, UsageError
from fmupsample.images.find import printable

NAME = "manifest.jsonl"
_PARTS = ".manifest"
_AHEAD = 64  # results that are announced at once
_ANNOUNCED = ("source", "relative", "output", "options_hash", "beside", "status")
Record = dict[str, Any]


class Manifest:
    """The manifest of an output folder. ``append`` may be called from any thread.

    Attributes:
        records: the latest record of each picture, by its ``source`` (an absolute path).
        pending: the latest announcement of each result, by its ``output``.
    """

    def __init__(self, folder: Path) -> None:
        """Read what is there.

        Raises:
            UsageError: a file of that name that is not such a manifest.
            OutputError: it cannot be read.
        """
        self.path = folder / NAME
        self.records: dict[str, Record] = {}
        self.pending: dict[str, Record] = {}
        self._ahead: Iterator[Record] = iter(())
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
            if line.strip() and b"\0" not in line:
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
        with self._lock:
            self._write([record])

    def _write(self, records: Sequence[Record]) -> None:
        self._open()
        view = memoryview(b"".join(map(_line, records)))
        while view:
            view = view[os.write(self._handle, view) :]
        for record in records:
            self._take(record)

    def forget(self, source: str) -> None:
        """The picture and its result are no longer there.

        Raises:
            OSError: the manifest cannot be written.
        """
        with self._lock:
            self._open()
            self.records.pop(source, None)

    def foresee(self, records: Iterable[Record]) -> None:
        """Results that this run will write, in about this order: see :meth:`expect`."""
        self._ahead = iter(records)

    def expect(self, record: Record) -> None:
        """Announce a result, if nobody has: at the return it is on the disk that its name is ours.

        The next ones that were foreseen are announced along with it.

        Args:
            record: with ``source``, ``output``, ``options_hash``, and ``beside`` if there are more.

        Raises:
            OSError: it cannot be written.
        """
        with self._lock:
            if self.pending.get(record["output"], {}).get("source") == record["source"]:
                return
            records = {r["output"]: r for r in (record, *islice(self._ahead, _AHEAD))}
            self._write([announcement(r) for r in records.values()])
            sync(self.path)

    def sync(self) -> None:
        """Wait until all lines are on the disk.

        Raises:
            OSError: they cannot be written.
        """
        with self._lock:
            if self._handle is not None:
                sync(self.path)

    def _take(self, record: Record) -> None:
        """``record`` is the latest about its picture."""
        key, status = record["source"], record["status"]
        if status == "pending":
            self.pending[record["output"]] = record
        elif status == "ok":
            self.pending.pop(record["output"], None)
        before = self.records.get(key)
        if before is not None and before["status"] == "failed" and status == "pending":
            return  # announced along with others: what was said of it stays
        if before is not None and status in ("failed", "pending"):
            made_with = before.get("options_hash")
            same = made_with is not None and made_with == record.get("options_hash")
            if before["status"] == "ok" and same:
                return
        if before is not None and status == "failed":
            record = {**record, "earlier": result_of(before), "beside": before.get("beside", [])}
        self.records[key] = record

    def _open(self) -> None:
        if self._handle is not None:
            return
        if self._parts:
            self._rewrite()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._handle, self._whole)
        sync(self.path.parent)  # its name

    def _rewrite(self) -> None:
        """One line a picture, sorted by output, and no parts."""
        done = {r["output"] for r in self.records.values() if r["status"] == "ok"}
        announced = [r for r in self.pending.values() if r["output"] not in done]
        said = {id(r): r for r in (*self.records.values(), *announced)}
        known = (r for r in said.values() if not self._came_to_nothing(r))
        ordered = sorted(known, key=lambda r: (r.get("output") or "", r["source"], r["status"]))
        with replacing(self.path) as temporary:
            self._whole = temporary.write_bytes(b"".join(map(_line, ordered)))
        self.pending = {r["output"]: r for r in ordered if r["status"] == "pending"}
        for part in self._parts:
            part.unlink(missing_ok=True)
        self._parts = []
        with contextlib.suppress(OSError):
            (self.path.parent / _PARTS).rmdir()

    def _came_to_nothing(self, record: Record) -> bool:
        """Whether this is the announcement of a file that was not written."""
        if record["status"] != "pending" or not record.keys() <= set(_ANNOUNCED):
            return False
        return not (self.path.parent / str(record["output"])).exists()

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


def announcement(record: Record) -> Record:
    """What is said of a result before its file takes its name."""
    return {k: record[k] for k in _ANNOUNCED if k in record} | {"status": "pending"}


def _line(record: Record) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


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
