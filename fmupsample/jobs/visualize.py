"""``visualize``: the features of each image as colours (PCA), and as similarity to points.

A basis shared by all images is fitted on a sample of them first. The features of that pass are kept
in memory up to a bound; beyond it they are computed again. Videos become videos.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from fmupsample.analysis.pca import PCABasis, sample_tokens
from fmupsample.backbones.views import title
from fmupsample.errors import FmupsampleError, ImageError, OutputError, UsageError
from fmupsample.folders import refuse_others_files
from fmupsample.formats.pictures import DrawnFile, jpeg, png
from fmupsample.images.find import Source, printable, stamp
from fmupsample.images.names import output_names
from fmupsample.images.size import check_output_size
from fmupsample.jobs.sheets import MAX_PAGES, mark_of, save_sheets, sheet_name
from fmupsample.pipeline import Item, Pipeline
from fmupsample.pipeline.cache import FeatureCache
from fmupsample.progress import Progress
from fmupsample.render.contact import PER_PAGE
from fmupsample.render.films import FilmRenderer, Look
from fmupsample.render.renderer import LAYOUTS, Drawing, Layout, Point, Renderer
from fmupsample.runs.job import Fault, Job, Made, Output, Recipe, Task
from fmupsample.runs.manifest import Manifest, Record
from fmupsample.runs.run import run
from fmupsample.runs.store import record_of
from fmupsample.video.clips import Clip
from fmupsample.video.frames import Film, FrameSource, films_of
from fmupsample.video.write import SUFFIX as VIDEO_SUFFIX
from fmupsample.video.write import VideoFile

FORMATS = ("png", "jpg")
BASIS_NAME = "basis.safetensors"
# A drawing made by another revision of this code is drawn again.
_REVISION = 1
_MAX_TOKENS = 16_000  # three directions and their ranges have settled by then
_MAX_TOKEN_NUMBERS = 12_000_000  # tokens x channels that a basis is fitted on: 96 MB in float64
# A basis is fitted on at most so many images and videos, and frames of each video, evenly spaced.
_BASIS_IMAGES, _BASIS_FRAMES = 256, 32


@dataclass(frozen=True)
class VisualizeOptions:
    """What to draw.

    Attributes:
        layout: ``"panel"``, ``"single"`` or ``"overlay"``, see :class:`.Renderer`.
        basis: ``"shared"`` (one PCA basis for all images of the run), ``"image"`` (each its own),
            or the path of a basis saved by an earlier run.
        foreground: fit and draw the PCA on each image's foreground only.
        points: pixels of the original images for similarity maps.
        image_format: ``"png"`` or ``"jpg"``.
        output_size: of single and overlay drawings (image, original, HxW, xN).
        contact_sheet: make one, of two images or more.
        overwrite: draw again what is finished.
        cache_bytes: memory for the features between the two passes.
    """

    layout: Layout = "panel"
    basis: str | Path = "shared"
    foreground: bool = False
    points: tuple[Point, ...] = ()
    image_format: str = "png"
    output_size: str = "image"
    contact_sheet: bool = True
    overwrite: bool = False
    cache_bytes: int = 2**30

    def check(self, *, videos: bool = False) -> None:
        """Raise a UsageError for what cannot be honoured, with videos or without."""
        if self.layout not in LAYOUTS:
            raise UsageError(f"layout {self.layout!r} is unknown: use {', '.join(LAYOUTS)}")
        if self.image_format not in FORMATS:
            raise UsageError(f"format {self.image_format!r} is unknown: use png or jpg")
        if check_output_size(self.output_size) != "image" and self.layout == "panel":
            raise UsageError(
                "--output-size is for --layout single and overlay; the tiles of a panel follow "
                "--image-size"
            )
        if videos and self.foreground:
            raise UsageError(
                "--foreground divides each picture by itself, which would flicker in a video: "
                "leave it away, or name pictures only"
            )


@dataclass
class Report:
    """What became of a run.

    Attributes:
        pictures: how many images there were.
        clips: the videos, see :class:`fmupsample.video.Clip`.
        drawn: files written, in the order of the images, then of the videos.
        skipped: images and videos all of whose files were there already.
        failed: ``{"source": ..., "error": ...}`` for each fault of an image or video.
        sheets: the contact sheets.
        basis: the shared basis that was used, if it is a file.
        explained: share of the features' variance that the three colours show (shared basis).
    """

    output: Path
    pictures: int
    clips: Sequence[Clip] = ()
    drawn: list[Path] = field(default_factory=list)
    skipped: int = 0
    failed: list[dict[str, str]] = field(default_factory=list)
    sheets: list[Path] = field(default_factory=list)
    basis: Path | None = None
    explained: float | None = None
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON summary."""
        return {
            "output": str(self.output),
            "pictures": self.pictures,
            "videos": [clip.to_json() for clip in self.clips],
            "drawn": [str(path) for path in self.drawn],
            "skipped": self.skipped,
            "failed": self.failed,
            "contact_sheets": [str(path) for path in self.sheets],
            "basis": str(self.basis) if self.basis else None,
            "explained_variance": self.explained,
            "seconds": round(self.seconds, 3),
        }


def visualize(
    pipeline: Pipeline,
    sources: Sequence[Source],
    output: str | Path,
    options: VisualizeOptions | None = None,
    *,
    clips: Sequence[Clip] = (),
    **how: Any,
) -> Report:
    """Draw ``sources`` into the folder ``output``, and videos (``clips``) as videos.

    Images that cannot be read or drawn are reported and left out; what an earlier run with the same
    options finished is not done again.

    Args:
        how: the keyword arguments of :func:`fmupsample.runs.run.run`, but for ``overwrite``.

    Raises:
        UsageError: options that cannot be honoured, a basis of another backbone.
        FmupsampleError, KeyboardInterrupt: as of :func:`fmupsample.runs.run.run`.
    """
    began, out = time.monotonic(), Path(output)
    job = Visualize(pipeline, options, videos=bool(clips))
    all_of_them = [*sources, *films_of(clips)]
    found = run(job, all_of_them, out, overwrite=job.options.overwrite, **how)
    report = Report(out, len(sources), clips, sheets=job.sheets, basis=job.basis_path(out))
    if job.basis is not None and job.options.basis == "shared":
        report.explained = float(job.basis.explained.sum())
    tasks = job.tasks(all_of_them)
    there = {record["source"] for record in found.skipped}
    missing = {task.source for task in tasks if task.key not in there}
    report.skipped = len({task.source for task in tasks} - missing)
    place = {str(task.output): number for number, task in enumerate(tasks)}
    names = [record["output"] for record in found.done]
    report.drawn = [out / name for name in sorted(names, key=lambda name: place.get(name, 0))]
    paths = {task.key: printable(task.source.path) for task in tasks}
    for record in found.failed:
        fault = {"source": paths.get(record["source"], record["source"]), "error": record["error"]}
        if fault not in report.failed:
            report.failed.append(fault)
    report.seconds = time.monotonic() - began
    return report


class Visualize(Job):
    """The job: a drawing of each image and video, and one for each point."""

    def __init__(
        self, pipeline: Pipeline, options: VisualizeOptions | None = None, *, videos: bool = False
    ) -> None:
        super().__init__(pipeline)
        self.options = options or VisualizeOptions()
        self.options.check(videos=videos)
        self.label, self.redoes, self.log = "drawing", True, ".fmupsample"
        self.suffix = f".{self.options.image_format}"
        self.basis: PCABasis | None = None
        self.sheets: list[Path] = []
        self.cache = FeatureCache(pipeline, self.options.cache_bytes)
        self.renderer = self._renderer(Renderer, "this picture", self.options.foreground)
        self._basis_metadata: dict[str, str] = {}

    def _renderer(self, kind: type[Renderer], own: str, foreground: bool = False) -> Renderer:
        shown = own if self.options.basis == "image" else "the run"
        note = f"{title(self.pipeline.backbone)}, PCA of {shown}"
        options = self.options
        return kind(self.pipeline, options.layout, options.output_size, foreground, note)

    # -- the plan -----------------------------------------------------------------------------

    def tasks(self, sources: Sequence[Source]) -> list[Task]:
        images = [source for source in sources if not isinstance(source, Film)]
        films = [source for source in sources if isinstance(source, Film)]
        pages = min(-(-len(images) // PER_PAGE), MAX_PAGES)
        reserved = [sheet_name(page, self.suffix) for page in range(pages)]
        kinds: list[Point | None] = [None, *self.options.points]
        names = {}
        for point in kinds:
            ending = "" if point is None else f".point-{point.x:g}-{point.y:g}"
            taken = reserved if point is None else ()
            found = output_names(images, ending + self.suffix, reserved=taken)
            found += output_names(films, ending + VIDEO_SUFFIX)
            names[point] = dict(zip([*images, *films], found, strict=True))
        return [
            Task(source, names[point][source], "" if point is None else f"point={point}")
            for source in sources
            for point in kinds
        ]

    def recipe(self, task: Task | None = None) -> Recipe:
        if task is None:
            return self._recipes[""]
        return self._recipes["point" if task.part else "pca"]

    @cached_property
    def _recipes(self) -> dict[str, Recipe]:
        options, upsampler = self.options, self.pipeline.upsampler
        common = {
            **self.pipeline.describe(),
            "upsampler": upsampler.name,
            "upsampler_fingerprint": upsampler.fingerprint,
            "format": options.image_format,
            "revision": _REVISION,
        }
        colours = {
            "layout": options.layout,
            "output_size": check_output_size(options.output_size),
            "foreground": options.foreground,
            "basis": options.basis if options.basis in ("shared", "image") else "file",
        }
        everything = {**common, **colours, "points": [str(point) for point in options.points]}
        return {
            "": Recipe.of(everything),
            "pca": Recipe.of({**common, **colours}),
            "point": Recipe.of(common),
        }

    def is_current(self, task: Task, record: Record) -> bool:
        basis = None if task.part else self.basis and self.basis.fingerprint
        same_colours = record.get("pca_fingerprint") == basis
        return same_colours and record.get("frames") == _frames_of(task.source)

    # -- the basis ----------------------------------------------------------------------------

    def basis_path(self, out: Path) -> Path | None:
        """Where the basis lies that all images share."""
        if self.options.basis == "image" or self.basis is None:
            return None
        shared = self.options.basis == "shared"
        return out / BASIS_NAME if shared else Path(self.options.basis)

    def look(self, out: Path, tasks: Sequence[Task], manifest: Manifest, overwrite: bool) -> None:
        """Take the basis of an earlier run, where its colours must stay or may."""
        backbone = self.pipeline.backbone
        if self.options.contact_sheet and not overwrite:
            sheet = sheet_name(0, self.suffix)
            ours = bool(manifest.records) or mark_of(out / sheet) is not None
            instead = "move it away, choose another folder, or give --overwrite or --no-sheet"
            refuse_others_files(out, [sheet], ours=ours, instead=instead)
        if self.options.basis == "image":
            return
        if self.options.basis != "shared":
            path = Path(self.options.basis)
            self.basis = PCABasis.load(path)
            self.basis.check(
                backbone=backbone.name, layer=backbone.layer, channels=backbone.channels,
                where=printable(path),
            )  # fmt: skip
            return
        model = {key: str(value) for key, value in self.pipeline.describe().items()}
        model |= {"foreground": str(self.options.foreground), "revision": str(_REVISION)}
        sources = dict.fromkeys(task.source for task in tasks)
        lines = [f"{printable(s.absolute)} {_stamp(s)}{_frames_of(s) or ''}" for s in sources]
        images = sha256("\n".join(lines).encode()).hexdigest()[:16]
        self._basis_metadata = {**model, "pictures": images}
        saved = _saved_basis(out / BASIS_NAME, overwrite)
        if saved is None:
            return
        same_model = all(saved.metadata.get(key) == value for key, value in model.items())
        wanted = {task.key for task in tasks}
        others = [
            record
            for key, record in manifest.records.items()
            if key not in wanted and record.get("pca_fingerprint") == saved.fingerprint
        ]
        if same_model and (others or saved.metadata.get("pictures") == images):
            self.basis = saved  # where drawings stay, equal colours must go on to mean the same
        elif others:
            raise UsageError(
                f"{printable(out)} holds {len(others)} drawings of other images in the colours of "
                "another model: choose another output folder, name those images too, or --overwrite"
            )

    def facts(self) -> dict[str, Any]:
        return {"basis": self.basis and self.basis.fingerprint}

    def join(self, out: Path, facts: dict[str, Any]) -> None:
        if facts["basis"] is None:
            return
        shared = self.options.basis == "shared"
        path = out / BASIS_NAME if shared else Path(self.options.basis)
        self.basis = PCABasis.load(path)
        if self.basis.fingerprint != facts["basis"]:
            raise FmupsampleError(
                f"{printable(path)} is not the basis that the first process uses: do all processes "
                "see the same files?"
            )

    def prepare(
        self, out: Path, sources: Sequence[Source], todo: Sequence[Task], progress: Progress
    ) -> None:
        """Fit the basis and save it; images that cannot be used are reported in their turn."""
        if self.options.basis != "shared" or self.basis is not None:
            return
        fitted_on = [
            one
            for source in sources[:: max(1, -(-len(sources) // _BASIS_IMAGES))]
            for one in (spread(source.frames) if isinstance(source, Film) else [source])
        ]
        progress.start(len(fitted_on), "features")
        tokens = list(self._sample(fitted_on, progress.advance))
        if tokens:
            together = torch.cat(tokens)
            metadata = {**self._basis_metadata, "tokens": str(len(together))}
            self.basis = PCABasis.fit(together, metadata=metadata)
            self.basis.save(out / BASIS_NAME)

    def _sample(
        self, sources: Sequence[Source], advance: Callable[[], None]
    ) -> Iterator[torch.Tensor]:
        """Tokens ``[n, C]`` of each of ``sources``, as many of all; fills the cache on the way."""
        most = min(_MAX_TOKENS, _MAX_TOKEN_NUMBERS // self.pipeline.backbone.channels)
        each = max(1, most // len(sources))
        for item in self.pipeline.items(sources, on_error=lambda source, error: advance()):
            yield sample_tokens(self.renderer.basis_tokens(item).T[:, :, None], each).cpu()
            if not isinstance(item.source, FrameSource):
                self.cache.add(item)
            advance()

    def steps(self, tasks: Sequence[Task]) -> int:
        films = [t.source for t in tasks if isinstance(t.source, Film) and not t.part]
        return sum(len(spread(f.frames)) for f in films) if self.options.basis == "image" else 0

    def items(
        self, sources: Iterable[Source], on_error: Callable[[Source, Exception], None]
    ) -> Iterator[Item]:
        return self.cache.items(list(sources), on_error=on_error)

    # -- the drawings -------------------------------------------------------------------------

    def outputs(
        self, tasks: Sequence[Task], items: Iterator[Item], advance: Callable[[], None]
    ) -> Iterator[Made]:
        if isinstance(tasks[0].source, Film):
            yield from self._film(tasks, items, advance)
            return
        [item] = items
        for task in tasks:
            if not task.part:
                try:
                    basis = self.basis or PCABasis.fit(self.renderer.basis_tokens(item))
                    draw = self.renderer.prepare_pca(item, basis)
                    yield self._drawn(task, item, draw)
                except FmupsampleError as error:
                    yield Fault(task, str(error))
        at = {f"point={point}": point for point in self.options.points}
        of_points = [task for task in tasks if task.part]
        drawings = self.renderer.draw_similarity(item, [at[task.part] for task in of_points])
        for task, drawing in zip(of_points, drawings, strict=True):
            if isinstance(drawing, Drawing):
                yield self._drawn(task, item, lambda drawing=drawing: drawing)
            else:
                yield Fault(task, str(drawing))

    def _drawn(self, task: Task, item: Item, draw: Callable[[], Drawing]) -> Output:
        """A file whose drawing is made where it is written."""
        record = self._record(task, item)

        def encoded() -> bytes:
            drawing = draw()
            record.update(photo=drawing.photo, colours=drawing.colours)
            if self.suffix == ".png":
                return png(drawing.pixels)
            return jpeg(drawing.pixels, quality=92, subsampling=0)

        return Output(task, partial(DrawnFile, draw=encoded), (0,), torch.uint8, {}, record)

    def _record(self, task: Task, item: Item) -> Record:
        record = record_of(self, task, item)
        if not task.part and self.options.basis != "image":
            record["pca_fingerprint"] = self.basis and self.basis.fingerprint
        if (frames := _frames_of(task.source)) is not None:
            record["frames"] = frames
        return record

    def _film(
        self, tasks: Sequence[Task], items: Iterator[Item], advance: Callable[[], None]
    ) -> Iterator[Made]:
        """The drawings of a video, in one pass over its frames."""
        film = tasks[0].source
        basis = self.basis
        if basis is None and not tasks[0].part:
            basis = PCABasis.fit(torch.cat(list(self._sample_film(film, advance))))
        renderer, looks = self._renderer(FilmRenderer, "this video"), {}
        at = {f"point={point}": point for point in self.options.points}
        outputs: dict[Task, Output] | None = None
        try:
            for item in items:
                if outputs is None:
                    outputs = {}
                    for task in tasks:
                        try:
                            if task.part:
                                _check_point(film, item, at[task.part])
                            outputs[task] = self._film_file(task, item, film.rate)
                            yield outputs[task]
                        except ImageError as error:
                            yield Fault(task, str(error))
                for task, output in outputs.items():
                    yield output, self._frame(renderer, item, basis, task, at, looks)
        finally:
            renderer.close()

    def _frame(self, renderer, item, basis, task, at, looks: dict[str, Look]):
        """The pixels of one frame of one drawing."""
        if not task.part:
            return renderer.draw_pca(item, basis).pixels
        first = task.part not in looks
        if first:
            looks[task.part] = renderer.look(item, at[task.part])
        return renderer.similarity(item, looks[task.part], first=first).pixels

    def _film_file(self, task: Task, item: Item, rate: float) -> Output:
        def kind(path: Path, *_: Any) -> VideoFile:
            return VideoFile(path, rate)

        record = self._record(task, item)
        return Output(task, kind, (), torch.uint8, {}, record, extension=VIDEO_SUFFIX)

    def _sample_film(self, film: Film, advance: Callable[[], None]) -> Iterator[torch.Tensor]:
        """Tokens for the basis of one video by itself."""
        for item in self.pipeline.items(spread(film.frames), on_error=_stop):
            yield sample_tokens(self.renderer.basis_tokens(item).T[:, :, None], 2000).cpu()
            advance()

    def finish(
        self, out: Path, records: Sequence[Record], progress: Progress, changed: bool
    ) -> None:
        """The contact sheets."""
        if self.options.contact_sheet:
            shown = [record for record in records if record.get("colours") and "part" not in record]
            self.sheets = save_sheets(out, shown, self.suffix, progress)


def spread(frames: Sequence[FrameSource]) -> list[FrameSource]:
    """Those that a basis is fitted on."""
    return list(frames[:: max(1, -(-len(frames) // _BASIS_FRAMES))])


def _saved_basis(path: Path, overwrite: bool) -> PCABasis | None:
    if not path.exists() or overwrite:
        return None
    try:
        return PCABasis.load(path)
    except UsageError as error:
        raise OutputError(
            f"{printable(path)} is in the way: it is not a PCA basis of this version; move it "
            "away, or give --overwrite"
        ) from error


def _stamp(source: Source) -> list[int] | None:
    found = stamp(source)
    return found and list(found)


def _frames_of(source: Source) -> str | None:
    """Which part of a video is drawn, and how fast."""
    if not isinstance(source, Film):
        return None
    text = f"{[frame.index for frame in source.frames]} {source.rate}"
    return sha256(text.encode()).hexdigest()[:12]


def _check_point(film: Film, item: Item, point: Point) -> None:
    """Raise an ImageError for a point outside the frames of a video."""
    height, width = item.frame.original
    if point.x >= width or point.y >= height:
        raise ImageError(
            f"{film}: point {point} lies outside the video, which is {width} pixels wide "
            f"and {height} high"
        )


def _stop(source: Source, error: FmupsampleError) -> None:
    raise error
