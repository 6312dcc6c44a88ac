"""The folder of pictures that a run of ``visualize`` leaves: names, saving, what is done already.

A log in the hidden subfolder ``.fmupsample`` says of each photograph what was drawn, with which
options and from which file, so that the next run redoes only what has changed.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
from PIL import Image

from fmupsample.atomic import remove_leftovers, replacing
from fmupsample.errors import FmupsampleError, OutputError, UsageError
from fmupsample.images.find import Source, printable, stamp
from fmupsample.images.read import read_picture
from fmupsample.progress import Progress
from fmupsample.render.contact import PER_PAGE, Entry, draw_sheet
from fmupsample.video.write import SUFFIX as VIDEO_SUFFIX
from fmupsample.visualization.draw import Drawing, Point
from fmupsample.visualization.thumbnails import Thumbnails, cut
from fmupsample.writers.manifest import Manifest, ManifestPart
from fmupsample.writers.names import output_names

FORMATS = ("png", "jpg")
BASIS_NAME = "basis.safetensors"
SHEET_STEM = "contact_sheet"
MAX_PAGES = 20

_LOG_FOLDER = ".fmupsample"
_DISK_ENDS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}


class Album:
    """The output folder of one run; any thread may save pictures and read the log.

    Args:
        folder: exists and is locked by the caller.
        sources: all pictures of the run.
        videos: all videos of the run.
        image_format: ``"png"`` or ``"jpg"``.
        points: of the similarity pictures.
        overwrite: redo what is finished, and replace files that are not in the log.

    Raises:
        UsageError: a result would take the place of one of the photographs.
    """

    def __init__(
        self,
        folder: Path,
        sources: Sequence[Source],
        *,
        image_format: str = "png",
        points: Sequence[Point] = (),
        overwrite: bool = False,
        videos: Sequence[Source] = (),
    ) -> None:
        self.folder = folder
        self.sources, self.videos = list(sources), list(videos)
        # As the files are before any is read: what is replaced meanwhile is drawn again.
        self._stamps = {source: _stamp(source) for source in (*sources, *videos)}
        self.overwrite = overwrite
        self.suffix = f".{image_format}"
        self._saving = threading.Lock()
        self._thumbnails: Thumbnails | None = Thumbnails(len(self.sources))
        pages = min(-(-len(self.sources) // PER_PAGE), MAX_PAGES)
        sheets = [self._sheet_name(n) for n in range(pages)]
        self.names: dict[Source, PurePosixPath] = self._named("", sheets)
        self.point_names = {
            point: self._named(f".point-{point.x:g}-{point.y:g}", []) for point in points
        }
        self._refuse_to_replace_photographs()
        self._log = Manifest(folder / _LOG_FOLDER)
        self._ours = _outputs_in(self._log.records.values())
        folders = {self.path(name).parent for name in self.names.values()}
        remove_leftovers({folder, self.log_folder, *folders})

    def _named(self, ending: str, reserved: Sequence[str]) -> dict[Source, PurePosixPath]:
        """The results of all pictures and videos: their names, then ``ending``."""
        names = output_names(self.sources, ending + self.suffix, reserved=reserved)
        videos = output_names(self.videos, ending + VIDEO_SUFFIX)
        return dict(zip([*self.sources, *self.videos], [*names, *videos], strict=True))

    def _refuse_to_replace_photographs(self) -> None:
        photographs = {os.path.realpath(s.path) for s in (*self.sources, *self.videos)}
        for named in (self.names, *self.point_names.values()):
            for name in named.values():
                if os.path.realpath(self.path(name)) in photographs:
                    raise UsageError(
                        f"the result {printable(self.path(name))} would replace a photograph "
                        "or video of this run; choose another folder with --output"
                    )

    def path(self, name: PurePosixPath | str) -> Path:
        """Where the result of this name lies."""
        return self.folder / name

    @property
    def log_folder(self) -> Path:
        """Of the log, and of what processes of one run leave for each other."""
        return self.folder / _LOG_FOLDER

    # -- several processes --------------------------------------------------------------------

    def share(self) -> None:
        """From now on other processes add to this album, see :class:`AlbumPart`.

        Raises:
            OutputError: the log cannot be written.
        """
        try:
            self.log_folder.mkdir(exist_ok=True)
            self._log.share()
        except OSError as error:
            where = printable(self._log.path)
            raise OutputError(f"{where} cannot be written: {error.strerror}") from error

    def pack(self, sources: Sequence[Source]) -> dict[str, Any]:
        """What another process must know to draw these, as plain values."""
        log = self._log.records
        names = [[str(n[s]) for n in (self.names, *self.point_names.values())] for s in sources]
        return {
            "names": names,
            "records": {key: log[key] for key in map(_key, sources) if key in log},
            "ours": sorted(self._ours.intersection(name for row in names for name in row)),
        }

    def absorb(self) -> set[str]:
        """The other processes have ended: their part of the log is merged into this one.

        Returns:
            The names of all results that are in it, of this process's too.
        """
        self._log.absorb()
        self._ours |= _outputs_in(self._log.records.values())
        return self._ours

    # -- what is done -------------------------------------------------------------------------

    def record(self, source: Source) -> dict[str, Any]:
        """What the log says of a picture, if its file has not changed since; else ``{}``."""
        record = self._log.records.get(_key(source), {})
        return record if record.get("input") == self._stamp(source) else {}

    def is_drawn(self, source: Source, recipe: str, point: Point | None = None) -> bool:
        """Whether the result is there, made by the same recipe from the same file."""
        if self.overwrite:
            return False
        record = self.record(source)
        name = (self.names if point is None else self.point_names[point])[source]
        made = record.get("pictures", {}).get("pca" if point is None else str(point), {})
        if made.get("recipe") != recipe or made.get("output") != str(name):
            return False
        try:
            return self.path(name).stat().st_size == made["bytes"]
        except OSError:
            return False

    def save(
        self, source: Source, drawing: Drawing, recipe: str, point: Point | None = None
    ) -> Path:
        """Write one picture and note it in the log.

        Raises:
            FmupsampleError: this one cannot be written.
            OutputError: nothing more can be written (a full disk).
        """
        data = encode(drawing.pixels, self.suffix)
        made = {
            "recipe": recipe,
            "bytes": len(data),
            "photo": drawing.photo,
            "colours": drawing.colours,
        }
        with self._saving:
            path, record = self._entry(source, point, made)
            self._write(path, data, record)
            if point is None and self._thumbnails is not None:
                self._thumbnails.add(source, drawing)
        return path

    @contextlib.contextmanager
    def film(
        self, source: Source, recipe: str, point: Point | None = None
    ) -> Iterator[tuple[Path, Path]]:
        """``with film(...) as (temporary, path)``: the video written there becomes ``path``.

        Raises:
            FmupsampleError, OutputError: as :meth:`save`; and whatever the body does.
        """
        made: dict[str, Any] = {"recipe": recipe, "bytes": 0}
        path, record = self._entry(source, point, made)
        with self._place(path, record, VIDEO_SUFFIX) as temporary:
            yield temporary, path
            made["bytes"] = temporary.stat().st_size
            # The PCA and the points of a video are written at once: each keeps what ended before.
            known = self.record(source).get("pictures", {})
            record["pictures"] = {**known, **record["pictures"]}

    def _entry(
        self, source: Source, point: Point | None, made: dict[str, Any]
    ) -> tuple[Path, dict[str, Any]]:
        """Where a result goes, and what the log will say of its picture with ``made`` in it."""
        name = (self.names if point is None else self.point_names[point])[source]
        made["output"] = str(name)
        before = self.record(source)
        record = {
            "source": _key(source),
            "status": "ok",
            "output": str(self.names[source]),
            "input": self._stamp(source),
            "pictures": {
                **before.get("pictures", {}),
                "pca" if point is None else str(point): made,
            },
        }
        return self.path(name), record

    def save_sheets(self, progress: Progress) -> list[Path]:
        """Contact sheets of every picture of this run that is there, drawn now or before.

        Pages that show what they should already are left, pages of an earlier, larger run removed.
        """
        shown: list[tuple[Source, dict[str, Any]]] = []
        for source in self.sources:
            made = self.record(source).get("pictures", {}).get("pca", {})
            if made.get("colours") and made.get("output") == str(self.names[source]):
                shown.append((source, made))
        if len(shown) < 2:
            return []
        most = MAX_PAGES * PER_PAGE
        if len(shown) > most:
            progress.warn(f"the contact sheets show the first {most} of {len(shown)} pictures")
        pages = [shown[n : n + PER_PAGE] for n in range(0, min(len(shown), most), PER_PAGE)]
        paths = [self.path(self._sheet_name(n)) for n in range(len(pages))]
        for n, (page, path) in enumerate(zip(pages, paths, strict=True)):
            known = self._log.records.get(f"sheet {n + 1}", {})
            content = [
                [made["output"], made["recipe"], self._stamp(source)] for source, made in page
            ]
            of = [n + 1, len(pages)]
            if known.get("shows") == content and known.get("of") == of and path.is_file():
                continue
            entries = [
                Entry(
                    str(self.names[source].with_suffix("")),
                    made["colours"][:1:-1],
                    self._loader(made, source),
                )
                for source, made in page
            ]
            sheet = draw_sheet(entries, note=f"{of[0]} of {of[1]}" if len(pages) > 1 else "")
            record = {"source": f"sheet {n + 1}", "status": "ok", "output": path.name}
            self._write(path, encode(sheet, self.suffix), {**record, "shows": content, "of": of})
        for n in range(len(pages), MAX_PAGES):
            if self._sheet_name(n) in self._ours:
                self.path(self._sheet_name(n)).unlink(missing_ok=True)
        return paths

    def close(self) -> None:
        """Tidy the log."""
        self._log.close()

    # -- within -------------------------------------------------------------------------------

    def _sheet_name(self, page: int) -> str:
        return f"{SHEET_STEM}{f'_{page + 1}' if page else ''}{self.suffix}"

    def _loader(self, made: dict[str, Any], source: Source):
        thumbnails = self._thumbnails
        assert thumbnails is not None

        def load() -> tuple[np.ndarray, np.ndarray]:
            if (kept := thumbnails.get(source)) is not None:
                return kept
            with Image.open(self.path(made["output"])) as image:
                result = np.asarray(image.convert("RGB"))
            colours = thumbnails.reduce(cut(result, made["colours"]))
            if made["photo"]:
                return thumbnails.reduce(cut(result, made["photo"])), colours
            try:
                return read_picture(source.path, lambda _: (400, 400))[0], colours
            except FmupsampleError:  # gone since
                return colours, colours

        return load

    def _stamp(self, source: Source) -> list[int] | None:
        return self._stamps[source] if source in self._stamps else _stamp(source)

    def _write(self, path: Path, data: bytes, record: dict[str, Any]) -> None:
        with self._place(path, record) as temporary:
            temporary.write_bytes(data)

    @contextlib.contextmanager
    def _place(self, path: Path, record: dict[str, Any], extension: str = "") -> Iterator[Path]:
        """What the body writes to the path it is given becomes ``path``, noted in the log."""
        shown = printable(path)
        relative = path.relative_to(self.folder).as_posix()
        try:
            if path.exists() and relative not in self._ours and not self.overwrite:
                raise FmupsampleError(
                    f"{shown} exists and was not made by this command; move it away, or give "
                    "--overwrite"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            self.log_folder.mkdir(exist_ok=True)
            with replacing(path, extension) as temporary:
                yield temporary
                # First the log, then the file: what is ours is known even after a crash.
                self._log.append({**record, "status": "pending"})
                self._log.sync()
            self._log.append(record)
            self._ours.add(relative)
        except OSError as error:
            reason = f"{shown} cannot be written: {error.strerror}"
            if error.errno in _DISK_ENDS:
                raise OutputError(f"{reason}; the pictures finished so far are kept") from error
            raise FmupsampleError(reason) from error


class AlbumPart(Album):
    """What a process that is not the first adds to the album; see :meth:`Album.share`.

    Args:
        rank: of this process.

    Raises:
        OutputError: its part of the log cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        *,
        image_format: str,
        points: Sequence[Point],
        overwrite: bool,
    ) -> None:
        self.folder, self.overwrite = folder, overwrite
        self.suffix = f".{image_format}"
        self.sources, self.names, self._stamps = [], {}, {}
        self._saving = threading.Lock()
        self._thumbnails = None  # sheets are the first one's
        self.point_names = {point: {} for point in points}
        self._log = ManifestPart(self.log_folder, f"{rank:05}")
        self._ours = set()

    def take(self, sources: Sequence[Source], packed: dict[str, Any]) -> None:
        """Draw these too, of which :meth:`Album.pack` of the first process gave ``packed``."""
        self.sources += sources
        self._stamps |= {source: _stamp(source) for source in sources}
        named = (self.names, *self.point_names.values())
        for source, row in zip(sources, packed["names"], strict=True):
            for names, name in zip(named, row, strict=True):
                names[source] = PurePosixPath(name)
        self._log.records.update(packed["records"])
        self._ours.update(packed["ours"])


def encode(pixels: np.ndarray, suffix: str) -> bytes:
    """uint8 ``[H, W, 3]`` as the bytes of a PNG or JPEG file."""
    if suffix == ".png":
        # Run lengths of filtered rows: an eighth of the time of level 6, and a fifth larger.
        options = [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
        if (wanted := getattr(cv2, "IMWRITE_PNG_FILTER", None)) is not None:
            options += [wanted, cv2.IMWRITE_PNG_FILTER_UP]  # not all five tried on every row
        done, encoded = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)
        assert done, pixels.shape
        return encoded.tobytes()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def _key(source: Source) -> str:
    # Not resolved: a link with a name of its own is a picture of its own.
    return printable(os.path.abspath(source.path))  # noqa: PTH100


def _stamp(source: Source) -> list[int] | None:
    found = stamp(source)
    return found and list(found)


def stamp_text(source: Source) -> str:
    """A picture's name and stamp as text, for a digest over all pictures of a run."""
    return f"{_key(source)} {_stamp(source)}"


def _outputs_in(records) -> set[str]:
    names = set()
    for record in records:
        names.add(record.get("output"))
        names.update(made.get("output") for made in record.get("pictures", {}).values())
    return names
