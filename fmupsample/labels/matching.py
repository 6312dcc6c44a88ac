"""Pairs of images and label files by their names: the same path below two folders."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from fmupsample.errors import UsageError
from fmupsample.images.find import Source, find_images, printable
from fmupsample.labels.classes import IGNORE, ClassTable

LABEL_SUFFIXES = (".png", ".bmp", ".gif", ".tif", ".tiff", ".npy")
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Pair:
    """An image and the file with its labels."""

    source: Source
    labels: Path


@dataclass
class Found:
    """What a layout found.

    Attributes:
        missing: images without labels.
        orphans: labels without an image.
        table: the layout's own classes, where it has them.
        ignored: values that never count in this layout.
    """

    pairs: list[Pair]
    missing: list[Source] = field(default_factory=list)
    orphans: list[Path] = field(default_factory=list)
    table: ClassTable | None = None
    ignored: tuple[int, ...] = (IGNORE,)


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
    images: Path, labels: Path, files: Sequence[Path], *, image_end: str = "", label_end: str = ""
) -> Found:
    """Pairs of the images below ``images`` and the ``files`` below ``labels`` of the same name.

    Labels in one folder serve nested images too, if no two images share a name.

    Args:
        image_end, label_end: regular expressions of what is left away at the end of names.

    Raises:
        UsageError: no images, or two label files for one image.
    """
    sources = find_images([images], exclude=[labels] if labels != images else [])
    keys = [_key(source.relative, image_end) for source in sources]
    names = Counter(key.name for key in keys)
    candidates: dict[PurePosixPath | str, list[Path]] = defaultdict(list)  # by path and by name
    for path in files:
        key = _key(PurePosixPath(*path.relative_to(labels).parts), label_end)
        candidates[key].append(path)
        candidates[key.name].append(path)
    pairs, missing = [], []
    for source, key in zip(sources, keys, strict=True):
        found = candidates.get(key)
        if found is None and names[key.name] == 1:
            found = candidates.get(key.name)
        if found is None:
            missing.append(source)
        elif len(found) > 1:
            raise UsageError(
                f"{source} has two label files: {printable(found[0])} and {printable(found[1])}"
            )
        else:
            pairs.append(Pair(source, found[0]))
    used = {pair.labels for pair in pairs}
    return Found(pairs, missing, [path for path in files if path not in used])


def _key(path: PurePosixPath, end: str) -> PurePosixPath:
    """``sub/a_mask.png`` -> ``sub/a`` for the end ``_mask``."""
    return path.with_name(re.sub(f"(?<=.)(?:{end})$", "", path.stem, flags=re.IGNORECASE))


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
            known = listed.suffix.lower() in _IMAGE_SUFFIXES
            names.append(listed.with_suffix("") if known else listed)
    if not names:
        raise UsageError(f"the split file {printable(path)} names no pictures")
    return names


def keep_split(found: Found, names: Sequence[PurePosixPath], path: Path) -> Found:
    """Only the images that a split names, by the end of their path.

    Raises:
        UsageError: a name that no image has.
    """
    pair_of = {pair.source: pair for pair in found.pairs}
    paired, missing = _by_ends(list(pair_of)), _by_ends(found.missing)
    kept = Found([], table=found.table, ignored=found.ignored)
    for name in names:
        # A list may begin at another folder than the images do.
        ends = _ends(name)
        if (end := next((e for e in ends if e in paired), None)) is not None:
            kept.pairs.append(pair_of[paired[end]])
        elif (end := next((e for e in ends if e in missing), None)) is not None:
            kept.missing.append(missing[end])
        else:
            raise UsageError(f"the split file {printable(path)} names {name}, which is no picture")
    return kept


def _ends(path: PurePosixPath) -> list[PurePosixPath]:
    """``a/b/c`` -> ``a/b/c``, ``b/c`` and ``c``."""
    return [PurePosixPath(*path.parts[start:]) for start in range(len(path.parts))]


def _by_ends(sources: Sequence[Source]) -> dict[PurePosixPath, Source]:
    """The first image whose path without extension ends so."""
    found: dict[PurePosixPath, Source] = {}
    for source in sources:
        for end in _ends(source.relative.with_suffix("")):
            found.setdefault(end, source)
    return found


def folder_of_split(root: Path, split: str | None, what: str) -> Path:
    """``root`` without a split; else the folder in it that is called so, or begins a word so.

    ``train`` is also ``training``, ``train2017`` and ``stuff_train2017_pixelmaps``.

    Raises:
        UsageError: no such split.
    """
    if split is None or (root / split).is_dir():
        return root if split is None else root / split
    there = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    for name in there:
        if re.search(f"(?<![A-Za-z]){re.escape(split)}", name):
            return root / name
    raise UsageError(
        f"there is no split {split!r} of {what} in {printable(root)}: "
        f"found {', '.join(there) or 'no subfolders'}"
    )


def find_labels(
    folders: Sequence[Path], sources: Sequence[Source], *, of_all: bool = True
) -> dict[Source, Path]:
    """The label file of each image: the same path below one of ``folders``, ending in ``.png``.

    An image in ``sub/a.jpg`` has its labels in ``sub/a.png``, or in ``a.png``.

    Args:
        of_all: every image must have labels; else one of them.

    Raises:
        UsageError: no such folder, or images without labels.
    """
    for folder in folders:
        need_folder(folder, "labels")
    found = {}
    for source in sources:
        relative = source.relative.with_suffix(".png")
        places = (f / name for f in folders for name in (relative, relative.name))
        if (path := next(filter(Path.is_file, places), None)) is not None:
            found[source] = path
    missing = [source for source in sources if source not in found]
    if missing and (of_all or not found):
        raise UsageError(
            f"{len(missing)} of {len(sources)} pictures have no labels in "
            f"{', '.join(map(printable, folders))}: {missing[0]} needs "
            f"{missing[0].relative.with_suffix('.png')} there"
        )
    return found
