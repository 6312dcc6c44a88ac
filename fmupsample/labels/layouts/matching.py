"""Pairs by name: the same path below two folders, but for what a layout adds to names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from fmupsample.errors import UsageError
from fmupsample.images.find import Source, find_images, printable
from fmupsample.labels.classes import ClassTable

LABEL_SUFFIXES = (".png", ".bmp", ".gif", ".tif", ".tiff", ".npy")
Key = Callable[[PurePosixPath], PurePosixPath]


@dataclass(frozen=True)
class Pair:
    """A picture and the file with its labels."""

    source: Source
    labels: Path


@dataclass
class Found:
    """What a layout found.

    Attributes:
        missing: pictures without labels.
        orphans: labels without a picture.
        table: the layout's own classes, where it has them.
        ignored: values that never count in this layout.
    """

    pairs: list[Pair]
    missing: list[Source] = field(default_factory=list)
    orphans: list[Path] = field(default_factory=list)
    table: ClassTable | None = None
    ignored: tuple[int, ...] = (255,)


def bare(path: PurePosixPath) -> PurePosixPath:
    """Without its extension."""
    return path.with_suffix("")


def label_files(folder: Path) -> list[Path]:
    """Every file below ``folder`` that may hold labels; hidden ones left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in LABEL_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def need_folder(folder: Path, what: str) -> Path:
    """``folder``, or a UsageError that says that it is missing."""
    if not folder.is_dir():
        kind = "is not a folder" if folder.exists() else "does not exist"
        raise UsageError(f"the folder of {what} {printable(folder)} {kind}")
    return folder


def match(
    images: Path,
    labels: Path,
    *,
    picture_key: Key = bare,
    label_key: Key = bare,
    wanted: Callable[[PurePosixPath], bool] = lambda relative: True,
    files: Iterable[Path] | None = None,
) -> Found:
    """Pairs of pictures below ``images`` and label files below ``labels`` with the same key.

    Labels in one folder serve nested pictures too, if no two pictures share a name.

    Args:
        wanted: which label files are looked at, by their path below ``labels``.
        files: the label files, where they are known.

    Raises:
        UsageError: a folder that is not there, no pictures, two label files for one picture.
    """
    need_folder(labels, "labels")
    sources = find_images([images], exclude=[labels] if labels != images else [])
    by_key: dict[PurePosixPath, list[Path]] = defaultdict(list)
    by_name: dict[str, list[Path]] = defaultdict(list)
    for path in label_files(labels) if files is None else files:
        relative = PurePosixPath(*path.relative_to(labels).parts)
        if wanted(relative):
            key = label_key(relative)
            by_key[key].append(path)
            by_name[key.name].append(path)
    names = [picture_key(source.relative).name for source in sources]
    pairs, missing = [], []
    for source, name in zip(sources, names, strict=True):
        candidates = by_key.get(picture_key(source.relative))
        if candidates is None and names.count(name) == 1:
            candidates = by_name.get(name)
        if candidates is None:
            missing.append(source)
        elif len(candidates) > 1:
            raise UsageError(
                f"{source} has two label files: {printable(candidates[0])} and "
                f"{printable(candidates[1])}"
            )
        else:
            pairs.append(Pair(source, candidates[0]))
    used = {pair.labels for pair in pairs}
    orphans = [path for paths in by_key.values() for path in paths if path not in used]
    return Found(pairs, missing, orphans)


def read_split(path: Path) -> list[PurePosixPath]:
    """Names in a split file, one a line, without extensions; a second column is left out.

    Raises:
        UsageError: unreadable, or without names.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the split file {printable(path)} cannot be read: {error}") from error
    names = []
    for line in lines:
        word = line.split()[0] if line.strip() and not line.strip().startswith("#") else ""
        if word:
            # As in VOC's and other lists: a name may have its folder and extension, or not.
            listed = PurePosixPath(word.lstrip("/"))
            known = listed.suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")
            names.append(bare(listed) if known else listed)
    if not names:
        raise UsageError(f"the split file {printable(path)} names no pictures")
    return names


def keep_split(found: Found, names: Sequence[PurePosixPath], path: Path) -> Found:
    """Only the pictures that a split names, by their path or, if unique, by their name.

    Raises:
        UsageError: a name that no picture has.
    """
    chosen_pairs, chosen_missing = [], []
    pairs, missing = _Index([p.source for p in found.pairs]), _Index(found.missing)
    for name in names:
        place = pairs.place(name)
        if place is not None:
            chosen_pairs.append(found.pairs[place])
            continue
        place = missing.place(name)
        if place is None:
            raise UsageError(f"the split file {printable(path)} names {name}, which is no picture")
        chosen_missing.append(found.missing[place])
    return Found(chosen_pairs, chosen_missing, [], found.table, found.ignored)


class _Index:
    def __init__(self, sources: Sequence[Source]) -> None:
        self.places: dict[PurePosixPath, int] = {}
        for place, source in enumerate(sources):
            key = bare(source.relative)
            # Every end of the path: a list may begin at another folder.
            for start in range(len(key.parts)):
                self.places.setdefault(PurePosixPath(*key.parts[start:]), place)

    def place(self, name: PurePosixPath) -> int | None:
        for start in range(len(name.parts)):
            found = self.places.get(PurePosixPath(*name.parts[start:]))
            if found is not None:
                return found
        return None


def split_folder(root: Path, split: str | None, what: str) -> Path:
    """``root/split``; the only subfolder, or ``root``, where no split is named.

    Raises:
        UsageError: no such split.
    """
    if split is None:
        return root
    folder = root / split
    if not folder.is_dir():
        there = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        raise UsageError(
            f"there is no split {split!r} of {what} in {printable(root)}: "
            f"found {', '.join(there) or 'no subfolders'}"
        )
    return folder
