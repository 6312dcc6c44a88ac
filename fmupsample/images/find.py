"""From what the user named (files, folders, globs, a list file) to the pictures of a run."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fmupsample.errors import UsageError, one_line

# What a folder is searched for: formats that Pillow decodes by itself. Left out are those for which
# it starts another program (EPS), or only recognises the file (HDF5, GRIB, MPEG).
EXTENSIONS = frozenset(
    {".apng", ".avif", ".bmp", ".dds", ".dib", ".gif", ".icns", ".ico", ".j2k", ".jfif", ".jp2"}
    | {".jpe", ".jpeg", ".jpg", ".jpx", ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".psd"}
    | {".qoi", ".sgi", ".tga", ".tif", ".tiff", ".webp"}
)
# Where frames are wanted as well.
VIDEO_EXTENSIONS = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})
_MAGIC = frozenset("*?[")
_LONGEST_LIST = 256 << 20  # bytes; a device such as /dev/zero never ends


@dataclass(frozen=True)
class Source:
    """One picture of a run.

    Attributes:
        path: what to open, as the user named it (absolute or relative to the working folder).
        relative: its name below the input it came from, with extension; never absolute, never
            with ``..``. Results keep this structure.
    """

    path: Path
    relative: PurePosixPath

    def __str__(self) -> str:
        return printable(self.path)

    @property
    def absolute(self) -> str:
        """Its absolute path, links not followed: what it is known by in a manifest."""
        return os.path.abspath(self.path)  # noqa: PTH100 - resolve() would follow links

    @property
    def facts(self) -> dict[str, Any]:
        """What a manifest says of it, beside what it says of every picture."""
        return {}


def stamp(source: Source) -> tuple[int, int] | None:
    """Bytes and time of change (ns) of the file: another stamp, another picture. ``None``: gone.

    Taken before a file is read: one that is replaced meanwhile is then seen to be another.
    """
    try:
        found = source.path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def is_video(source: Source) -> bool:
    """Whether it is a video, by its extension."""
    return source.path.suffix.lower() in VIDEO_EXTENSIONS


def storable(path: str | os.PathLike[str]) -> str:
    """``path`` as text that any JSON reader takes: undecodable bytes become ``\\udcXX``."""
    return os.fspath(path).encode("utf-8", "backslashreplace").decode("utf-8")


def printable(path: str | os.PathLike[str]) -> str:
    """``path`` for a message of one line: control characters become ``\\n``, ``\\x1b``, ..."""
    return one_line(storable(path))


def find_images(
    inputs: Sequence[str | Path],
    *,
    list_file: str | Path | None = None,
    exclude: Iterable[Path] = (),
    warn: Callable[[str], None] | None = None,
    videos: bool = False,
) -> list[Source]:
    """The pictures named by ``inputs`` and ``list_file``, sorted by name, each once.

    Folders are searched recursively for :data:`EXTENSIONS`; hidden files and folders are left out,
    links are followed, each folder once. Named files are taken whatever their extension. A pattern
    (``*``, ``?``, ``[]``, ``**``) that names no existing file is expanded here; its results keep
    their names below the folder part of the pattern. Paths in the list file, one a line, are
    relative to it (``-`` reads standard input); empty lines and lines that start with ``#`` are
    comments.

    Args:
        exclude: folders that are not searched (the output folder, when it lies inside an input).
        warn: told about subfolders that cannot be read; without it they are an error.
        videos: look for :data:`VIDEO_EXTENSIONS` as well.

    Raises:
        UsageError: nothing named, a path that does not exist, a pattern or folder without pictures.
    """
    search = _Search(exclude, warn, EXTENSIONS | VIDEO_EXTENSIONS if videos else EXTENSIONS)
    found: dict[tuple[str, str], Source] = {}
    searched: list[str] = []
    real: dict[str, str] = {}  # folders, links followed: the same for all that lies in one
    for named, relative, where in _named(inputs, list_file):
        searched.append(str(named))
        for source in search.expand(named, relative, where):
            # The same file named twice has the same folder and name; a link with a name of its own
            # is a picture of its own.
            parent, name = os.path.split(source.path)
            if parent not in real:
                real[parent] = os.path.realpath(parent)
            found.setdefault((real[parent], name), source)
    if not searched:
        raise UsageError(
            "no pictures named: give files, folders or patterns, or a list with --list"
        )
    if not found:
        shown = ", ".join(printable(s) for s in searched[:5])
        known = " ".join(extension[1:] for extension in sorted(search.extensions))
        more = f" and {len(searched) - 5} more" if len(searched) > 5 else ""
        raise UsageError(
            f"no pictures found in {shown}{more}: looked for {known}, hidden files and folders "
            "left out"
        )
    return sorted(found.values(), key=lambda s: (s.relative.parts, os.fspath(s.path)))


def as_sources(inputs: Any) -> Iterator[Source]:
    """The pictures of a run in the order of ``inputs``: paths, or sources as they are; or only one.

    Folders and patterns give what :func:`find_images` finds. Whether a named file exists is found
    out when it is read.

    Raises:
        UsageError: something else, a folder without pictures.
    """
    for item in [inputs] if isinstance(inputs, str | os.PathLike | Source) else inputs:
        if isinstance(item, Source):
            yield item
        elif not isinstance(item, str | os.PathLike):
            raise UsageError(
                f"a picture of type {type(item).__name__} cannot be found: give paths; what is in "
                "memory goes into Pipeline.item(image)"
            )
        elif is_several(item):
            yield from find_images([item])
        else:
            yield Source(Path(item), PurePosixPath(Path(item).name))


def is_several(path: str | os.PathLike[str]) -> bool:
    """Whether it names a folder or a pattern, and no file."""
    found = Path(path)
    return found.is_dir() or bool(_MAGIC.intersection(str(found)) and not found.exists())


def _named(
    inputs: Sequence[str | Path], list_file: str | Path | None
) -> Iterator[tuple[Path, PurePosixPath | None, str]]:
    """Each named path, the name it should keep (``None``: by its kind), and where it was named."""
    for item in inputs:
        if not str(item):
            raise UsageError("an empty name is not a picture (an unset variable in the command?)")
        yield Path(item), None, ""
    if list_file is None:
        return
    base, text = _read_list(list_file)
    for number, raw in enumerate(text.split("\n"), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        listed = PurePosixPath(os.path.normpath(line))
        # A relative path is the name that its author chose: keep it, unless it leaves the folder.
        keep = None if listed.is_absolute() or ".." in listed.parts else listed
        yield base / line, keep, f"{printable(list_file)} line {number}: "


def _read_list(list_file: str | Path) -> tuple[Path, str]:
    base, shown = Path(list_file).parent, printable(list_file)
    try:
        if str(list_file) == "-":
            # The bytes: paths are not in the encoding that Python guesses for the terminal.
            content = getattr(sys.stdin, "buffer", sys.stdin).read(_LONGEST_LIST + 1)
        else:
            with Path(list_file).open("rb") as file:
                content = file.read(_LONGEST_LIST + 1)
    except OSError as error:
        raise UsageError(f"the list {shown} cannot be read: {error.strerror or error}") from error
    if len(content) > _LONGEST_LIST:
        raise UsageError(f"the list {shown} is longer than {_LONGEST_LIST >> 20} MB: cut it up")
    if isinstance(content, bytes):
        content = content.decode("utf-8-sig", "surrogateescape")
    if "\0" in content:
        raise UsageError(f"the list {shown} is not text: it must hold one path a line")
    return base, content


class _Search:
    def __init__(
        self,
        exclude: Iterable[Path],
        warn: Callable[[str], None] | None,
        extensions: frozenset[str],
    ) -> None:
        self.extensions = extensions
        self.exclude = {os.path.realpath(folder) for folder in exclude}
        self.warn = warn

    def expand(self, named: Path, keep: PurePosixPath | None, where: str) -> Iterator[Source]:
        """The pictures behind one named path; ``where`` opens the message of an error."""
        shown = printable(named)
        try:
            exists = named.exists()
        except OSError as error:  # a name too long, a folder on the way that may not be entered
            raise UsageError(f"{where}{shown} cannot be used: {error.strerror or error}") from error
        if exists and named.is_dir():
            yield from self.folder(named, keep or PurePosixPath())
        elif exists and named.is_file():
            yield Source(named, keep or PurePosixPath(named.name))
        elif exists:
            raise UsageError(f"{where}{shown} is neither a file nor a folder")
        elif named.is_symlink():
            raise UsageError(f"{where}{shown} is a link to something that does not exist")
        elif _MAGIC.intersection(str(named)):
            yield from self.glob(named, where)
        else:
            raise UsageError(f"{where}{shown} does not exist")

    def folder(self, root: Path, prefix: PurePosixPath) -> Iterator[Source]:
        """All pictures below ``root``, named below ``prefix``; ends on any tangle of links."""
        seen: set[str] = set()
        todo = deque([(root, prefix)])
        while todo:
            folder, name = todo.pop()
            real = os.path.realpath(folder)
            if real in seen or (real in self.exclude and folder != root):
                continue
            seen.add(real)
            try:
                with os.scandir(folder) as entries:
                    children = sorted(entries, key=lambda e: e.name)
            except OSError as error:
                message = f"folder {printable(folder)} cannot be read: {error.strerror or error}"
                if folder == root or self.warn is None:
                    raise UsageError(message) from error
                self.warn(f"{message}; left out")
                continue
            links, folders = [], []
            for entry in children:
                if entry.name.startswith("."):
                    continue
                path, below = folder / entry.name, name / entry.name
                if _is(entry.is_dir):
                    (links if entry.is_symlink() else folders).append((path, below))
                elif path.suffix.lower() in self.extensions and (
                    # A link to nowhere is kept: reading it reports which picture is missing.
                    _is(entry.is_file) or (entry.is_symlink() and not path.exists())
                ):
                    yield Source(path, below)
            # Links come last, so that a folder is named by its own place if it has one.
            todo.extendleft(links)
            todo.extend(reversed(folders))

    def glob(self, pattern: Path, where: str) -> Iterator[Source]:
        """Expand a pattern the shell left alone (quoted, or too long for a command line)."""
        parts = pattern.parts
        first = next(i for i, part in enumerate(parts) if _MAGIC.intersection(part))
        base, rest = Path(*parts[:first]), PurePosixPath(*parts[first:])
        # "*.dat" asks for these files by name; "*" means the pictures among them.
        by_name = bool(rest.suffix) and not _MAGIC.intersection(rest.suffix)
        hidden_wanted = any(part.startswith(".") for part in rest.parts)
        matched = False
        try:
            matches = sorted(base.glob(str(rest)))
        except (OSError, ValueError, NotImplementedError) as error:
            raise UsageError(f"{where}bad pattern {printable(pattern)}: {error}") from error
        for path in matches:
            below = PurePosixPath(*path.relative_to(base).parts)
            if ".." in below.parts:
                below = PurePosixPath(path.name)
            if not hidden_wanted and any(part.startswith(".") for part in below.parts):
                continue
            if path.is_dir():
                if "**" not in rest.parts:  # "**" lists the files below by itself
                    matched = True
                    yield from self.folder(path, below)
            elif by_name or path.suffix.lower() in self.extensions:
                matched = True
                yield Source(path, below)
        if not matched:
            raise UsageError(f"{where}no picture matches {printable(pattern)}")


def _is(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except OSError:  # a link into a folder that may not be read
        return False
