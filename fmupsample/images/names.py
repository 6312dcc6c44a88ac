"""Where each picture's result goes: a name that says where it came from, and is its own."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from fmupsample.images.find import Source

_MAX_NAME = 255  # bytes, on nearly every file system


def output_names(
    sources: Sequence[Source], suffix: str, *, reserved: Iterable[str] = ()
) -> list[PurePosixPath]:
    """A relative output path for each source; depends on the set of sources and nothing else.

    ``sub/a.jpg`` becomes ``sub/a`` + suffix. Pictures that would share a name, or names that
    differ only in case or Unicode form, all keep their extension (``a.jpg``, ``a.png``); if they
    still clash (the same name from two inputs) they get the folder above their input in front,
    and at last a number in the order of their paths.

    Args:
        suffix: with its dot.
        reserved: names in the output folder that no picture may take.
    """
    # The names of most are never looked at again: of a million pictures, only those that clash get
    # ladders.
    ladders: dict[int, list[PurePosixPath]] = {}
    level = [0] * len(sources)
    taken = {_key(name) for name in reserved}
    names = [_file(_bare(source), suffix) for source in sources]
    while True:
        clashing = _clashes(names, taken)
        for i in clashing:
            ladders.setdefault(i, _ladder(sources[i]))
        movable = [i for i in clashing if level[i] + 1 < len(ladders[i])]
        if not movable:
            break
        for i in movable:
            level[i] += 1
            names[i] = _file(ladders[i][level[i]], suffix)
    if clashing:
        clashing.sort(key=lambda i: sources[i].absolute)
        used = taken | {_key(n) for i, n in enumerate(names) if i not in set(clashing)}
        folders = {_key(parent) for name in names for parent in name.parents}
        for i in clashing:
            number, name = 1, names[i]
            while _key(name) in used or _key(name) in folders:
                number += 1
                stem = ladders[i][-1]
                name = _file(stem.with_name(f"{stem.name}~{number}"), suffix)
            used.add(_key(name))
            names[i] = name
    return names


def _bare(source: Source) -> PurePosixPath:
    """The first of :func:`_ladder`."""
    relative = PurePosixPath(_readable(str(source.relative)))
    # Dots alone name a folder, and not one of ours: "...mp4" keeps its extension.
    return relative.with_name(relative.stem) if relative.stem.strip(".") else relative


def _ladder(source: Source) -> list[PurePosixPath]:
    """Names without suffix, the nicest first."""
    above = Path(source.absolute).parts
    above = above[: len(above) - len(source.relative.parts)]
    relative, bare = PurePosixPath(_readable(str(source.relative))), _bare(source)
    names = [bare, relative]
    if len(above) > 1:  # not the root of the disk
        names += [PurePosixPath(_readable(above[-1])) / n for n in (bare, relative)]
    return names


def _readable(name: str) -> str:
    """Bytes that are not UTF-8 as ``%FF``: the safetensors library opens no other names."""
    if name.isascii():
        return name
    return "".join(f"%{ord(c) - 0xDC00:02X}" if "\udc80" <= c <= "\udcff" else c for c in name)


def _clashes(names: Sequence[PurePosixPath], taken: set[str]) -> list[int]:
    groups: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(names):
        groups[_key(name)].append(i)
    parents = {name.parent for name in names}
    folders = {_key(above) for parent in parents for above in (parent, *parent.parents)}
    return [
        i
        for key, group in groups.items()
        if len(group) > 1 or key in taken or key in folders
        for i in group
    ]


def _key(name: str | PurePosixPath) -> str:
    return unicodedata.normalize("NFC", str(name)).casefold()


def _file(stem: PurePosixPath, suffix: str) -> PurePosixPath:
    room = _MAX_NAME - len(suffix)
    encoded = os.fsencode(stem.name)
    if len(encoded) > room:
        digest = hashlib.sha256(encoded).hexdigest()[:8]
        short = encoded[: room - 9].decode("utf-8", "ignore")
        stem = stem.with_name(f"{short}~{digest}")
    return stem.with_name(stem.name + suffix)
