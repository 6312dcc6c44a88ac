"""Results in tar files of many pictures each, as WebDataset reads them.

A sample is two members that follow each other, ``KEY.json`` (the record of the picture) and
``KEY.safetensors`` or ``KEY.npy``; keys have no dot after their last slash. A shard grows under a
hidden name and takes its own, ``features-000012.tar``, when it is whole. The manifest says where in
which shard a sample is (``output``, ``key``, ``offset``, ``bytes``), once it is there: what lies
behind the last of them in a growing shard was written by a run that was killed, and is cut off.
A sample is on the disk before the manifest says so, and the manifest before a shard takes its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath

from fmupsample.errors import OutputError
from fmupsample.images.find import Source, printable
from fmupsample.images.names import output_names
from fmupsample.runs.manifest import Record

_NAME = re.compile(r"features-(\d{6,})\.tar")
_GROWING = re.compile(r"\.(features-\d{6,}\.tar)\.growing")
_BLOCK = 512
_END = bytes(2 * _BLOCK)  # of a tar file
_COPIED = 1 << 24  # bytes at a time
# Of a record, what is not a fact about the result.
_NOT_STORED = ("status", "output", "seconds", "bytes", "options")


def shard_name(number: int) -> str:
    return f"features-{number:06}.tar"


def sample_keys(sources: Sequence[Source], suffix: str, taken: Iterable[str]) -> list[str]:
    """A key for each source, by the names that files of their own would have.

    Args:
        suffix: of those files.
        taken: keys of samples that stay.
    """
    names = output_names(sources, suffix)
    used = {key.casefold() for key in taken}
    keys = {}
    for i in sorted(range(len(sources)), key=lambda i: sources[i].absolute):
        stem = names[i].name.removesuffix(suffix).replace(".", "_")
        key, number = str(names[i].with_name(stem)), 1
        while key.casefold() in used:
            number += 1
            key = str(names[i].with_name(f"{stem}~{number}"))
        used.add(key.casefold())
        keys[i] = key
    return [keys[i] for i in range(len(sources))]


class Shards:
    """The shards of an output folder: what they hold, and the one that grows.

    Used by one thread at a time, under the :class:`.lock.FolderLock`.

    Args:
        size: samples of a whole shard.
        suffix: of the files in them.

    Attributes:
        next: the least number that no shard has or had, once :meth:`resume` was called.
        before_naming: called when a shard is whole, before it takes its name.
        number: gives the number of each new shard, ``next`` unless it is set to something else.
    """

    def __init__(self, folder: Path, size: int = 1, suffix: str = "") -> None:
        """Look at what is there.

        Raises:
            OutputError: it cannot be looked at.
        """
        self.folder = folder
        self.sizes: dict[str, int] = {}  # of whole and growing shards, by their final names
        self.growing: set[str] = set()
        self._handle: int | None = None
        self._current, self._count, self._end = "", 0, 0
        self.size, self.suffix, self.next = size, suffix, 0
        self.number: Callable[[], int] = self._number
        self.before_naming: Callable[[], None] = lambda: None
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if _NAME.fullmatch(entry.name):
                        self.sizes[entry.name] = entry.stat().st_size
                    elif match := _GROWING.fullmatch(entry.name):
                        self.growing.add(match[1])
                        self.sizes[match[1]] = entry.stat().st_size
        except FileNotFoundError:
            pass
        except OSError as error:
            raise OutputError(f"cannot read {printable(folder)}: {error.strerror}") from error

    def path(self, name: str) -> Path:
        """Where a shard lies now."""
        return self.folder / (f".{name}.growing" if name in self.growing else name)

    def holds(self, record: Record) -> bool:
        """Whether the sample of ``record`` is there, as far as sizes tell."""
        offset, size = record.get("offset"), record.get("bytes")
        if not isinstance(offset, int) or not isinstance(size, int) or offset < 0 or size < 1:
            return False
        known = isinstance(record.get("key"), str)
        return known and offset + size <= self.sizes.get(str(record.get("output")), -1)

    def unrecorded(self, records: Iterable[Record]) -> list[Record]:
        """Records of the samples in whole shards that no record names: a manifest that was lost.

        They lack the options themselves, of which a sample holds the hash only.
        """
        named = {str(record.get("output")) for record in records}
        found: list[Record] = []
        for name in sorted(self.sizes.keys() - named - self.growing):
            with contextlib.suppress(tarfile.TarError, OSError, ValueError, KeyError, TypeError):
                found += self._read_samples(name)
        return found

    def _read_samples(self, name: str) -> list[Record]:
        found = []
        with tarfile.open(self.path(name)) as tar:
            members = tar.getmembers()
            for said, data in zip(members[::2], members[1::2], strict=True):
                record = json.load(tar.extractfile(said))
                end = data.offset_data + data.size + len(_padding(data.size))
                found.append(
                    record
                    | {"source": str(record["source"]), "status": "ok", "output": name}
                    | {"offset": said.offset, "bytes": end - said.offset}
                )
        return found

    # -- resuming -----------------------------------------------------------------------------

    def resume(self, records: Iterable[Record], kept: Sequence[Record]) -> list[Record]:
        """Go on with the shard that grew; drop samples that no longer count.

        Args:
            records: all there are; no new shard takes a name that one of them has.
            kept: those whose samples stay.

        Returns:
            Records of samples that had to move to another shard, for the manifest. Call
            :meth:`drop` when they are in it.

        Raises:
            OSError: something cannot be written.
        """
        names = {*self.sizes, *(str(r.get("output")) for r in records)}
        numbers = [int(match[1]) for name in names if (match := _NAME.fullmatch(name))]
        self.next = max(numbers, default=-1) + 1
        held: dict[str, list[Record]] = {name: [] for name in self.sizes}
        named = {str(r.get("output")) for r in records}
        for record in kept:
            held[record["output"]].append(record)
        self._stale = []
        moving: list[Record] = []
        for name, samples in sorted(held.items()):
            filled = sum(r["bytes"] for r in samples)
            end = max((r["offset"] + r["bytes"] for r in samples), default=0)
            if name in self.growing:
                if filled == end and self._handle is None:
                    self._go_on(name, len(samples), end)
                    continue
            elif filled + len(_END) == self.sizes[name] or name not in named:
                continue  # whole, or of nobody that we know
            self._stale.append(name)
            moving += sorted(samples, key=lambda r: r["offset"])
        return [self._moved(record) for record in moving]

    def drop(self) -> None:
        """Delete shards whose samples have moved, or count no longer."""
        for name in self._stale:
            self.path(name).unlink(missing_ok=True)
            self.growing.discard(name)
            del self.sizes[name]

    def _go_on(self, name: str, count: int, end: int) -> None:
        handle = os.open(self.path(name), os.O_RDWR | os.O_APPEND)
        self._handle, self._current, self._count, self._end = handle, name, count, end
        os.ftruncate(handle, end)

    def _moved(self, record: Record) -> Record:
        with self.path(record["output"]).open("rb") as file:
            return {**record, **self._append(b"", file, record["offset"], record["bytes"])}

    # -- writing ------------------------------------------------------------------------------

    def keep(self, temporary: Path, record: Record) -> None:
        """Put the file ``temporary`` into the current shard; ``record``, which holds its ``key``,
        says where."""
        stored = {k: v for k, v in record.items() if k not in _NOT_STORED}
        text = json.dumps(stored, separators=(",", ":")).encode()
        size = temporary.stat().st_size
        before = _header(f"{record['key']}.json", len(text)) + text + _padding(len(text))
        before += _header(record["key"] + self.suffix, size)
        with temporary.open("rb") as file:
            record |= self._append(before, file, 0, size)

    def finish(self) -> None:
        """The current shard is whole, however few samples it has.

        Raises:
            OSError: it cannot be written.
        """
        if self._handle is None:
            return
        _write(self._handle, _END)
        os.fsync(self._handle)
        self.before_naming()
        growing = self.path(self._current)
        growing.rename(self.folder / self._current)
        self.growing.discard(self._current)
        self.close()

    def close(self) -> None:
        """Leave the current shard as it is, for another run to go on."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _append(self, before: bytes, file: object, offset: int, size: int) -> Record:
        """``before``, then a part of ``file`` and its padding; where that is now."""
        if self._handle is not None and self._count >= self.size:
            self.finish()
        if self._handle is None:
            self._begin()
        assert self._handle is not None
        start = self._end
        try:
            _write(self._handle, before)
            file.seek(offset)
            left = size
            while left:
                part = file.read(min(left, _COPIED))
                if not part:
                    raise OSError(None, "a sample is shorter than it was")
                _write(self._handle, part)
                left -= len(part)
            _write(self._handle, _padding(size))
            os.fsync(self._handle)
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, start)
            raise
        self._count += 1
        self._end = start + len(before) + size + len(_padding(size))
        return {"output": self._current, "offset": start, "bytes": self._end - start}

    def _number(self) -> int:
        self.next += 1
        return self.next - 1

    def _begin(self) -> None:
        name = shard_name(self.number())
        self.growing.add(name)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND
        self._handle = os.open(self.path(name), flags, 0o644)
        self._current, self._count, self._end = name, 0, 0


def _header(name: str, size: int) -> bytes:
    entry = tarfile.TarInfo(str(PurePosixPath(name)))
    entry.size = size
    return entry.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _padding(size: int) -> bytes:
    return bytes(-size % _BLOCK)


def _write(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
