"""``visualize``: the features of each image as colours (PCA), and as similarity to points.

A basis shared by all images is fitted on a sample of them first. The features of that pass are kept
in memory up to a bound; beyond it they are computed again. Videos become videos.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from fmupsample.backbones.views import title
from fmupsample.draw.contact import PER_PAGE
from fmupsample.draw.films import FilmRenderer, Look
from fmupsample.draw.pca import PCABasis, sample_tokens
from fmupsample.draw.renderer import Drawing, Point, Renderer
from fmupsample.errors import FmupsampleError, ImageError
from fmupsample.folders import refuse_others_files
from fmupsample.formats.pictures import DrawnFile, jpeg, png
from fmupsample.images.find import Source, printable
from fmupsample.images.names import output_names
from fmupsample.images.size import check_output_size
from fmupsample.jobs.shared_basis import REVISION, SharedBasis, frames_mark, spread
from fmupsample.jobs.sheets import MAX_PAGES, mark_of, save_sheets, sheet_name
from fmupsample.jobs.visualize_options import FORMATS, Report, VisualizeOptions
from fmupsample.pipeline import Item, Pipeline
from fmupsample.pipeline.cache import FeatureCache
from fmupsample.progress import Progress
from fmupsample.runs.job import Fault, Job, Made, Output, Recipe, Task
from fmupsample.runs.manifest import Manifest, Record, result_of
from fmupsample.runs.run import run
from fmupsample.runs.store import record_of
from fmupsample.video.clips import Clip
from fmupsample.video.frames import Film, films_of
from fmupsample.video.write import SUFFIX as VIDEO_SUFFIX
from fmupsample.video.write import VideoFile


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
    options finished is not done again. Drawings of earlier runs among ``sources`` are left out.

    Args:
        how: the keyword arguments of :func:`fmupsample.runs.run.run`, but for ``overwrite``.

    Raises:
        UsageError: options that cannot be honoured, a basis of another backbone.
        FmupsampleError, KeyboardInterrupt: as of :func:`fmupsample.runs.run.run`.
    """
    began, out = time.monotonic(), Path(output)
    job = Visualize(pipeline, options, videos=bool(clips))
    sources = _without_drawings(sources, out, job)
    all_of_them = [*sources, *films_of(clips)]
    found = run(job, all_of_them, out, overwrite=job.options.overwrite, **how)
    report = Report(out, len(sources), clips, sheets=job.sheets, basis=job.colours.path(out))
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


def _without_drawings(sources: Sequence[Source], out: Path, job: Visualize) -> list[Source]:
    """``sources`` but for what earlier runs have drawn into the same folder."""
    records = Manifest(out / job.log).records.values()
    names = {name for record in records for name in (result_of(record), *record.get("beside", ()))}
    if not names:
        return list(sources)
    names |= {sheet_name(n, f".{ending}") for n in range(MAX_PAGES) for ending in FORMATS}
    own = {os.path.realpath(out / name) for name in names if name}
    return [source for source in sources if os.path.realpath(source.path) not in own]


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
        self.colours = SharedBasis(pipeline, self.options)
        self.sheets: list[Path] = []
        self.cache = FeatureCache(pipeline, self.options.cache_bytes)
        self.renderer = self._renderer(Renderer, "this picture", self.options.foreground)

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
            "revision": REVISION,
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
        return same_colours and record.get("frames") == frames_mark(task.source)

    # -- the basis ----------------------------------------------------------------------------

    @property
    def basis(self) -> PCABasis | None:
        """That of all images; ``None``: each has its own, or there is none yet."""
        return self.colours.basis

    def look(self, out: Path, tasks: Sequence[Task], manifest: Manifest, overwrite: bool) -> None:
        if self.options.contact_sheet and not overwrite:
            sheet = sheet_name(0, self.suffix)
            ours = bool(manifest.records) or mark_of(out / sheet) is not None
            instead = "move it away, choose another folder, or give --overwrite or --no-sheet"
            refuse_others_files(out, [sheet], ours=ours, instead=instead)
        self.colours.look(out, tasks, manifest, overwrite)

    def facts(self) -> dict[str, Any]:
        return {"basis": self.basis and self.basis.fingerprint}

    def join(self, out: Path, facts: dict[str, Any]) -> None:
        self.colours.join(out, facts["basis"])

    def prepare(self, out: Path, sources: Sequence[Source], progress: Progress) -> None:
        self.colours.fit(out, sources, progress, self.renderer.basis_tokens, self.cache.add)

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
        if (frames := frames_mark(task.source)) is not None:
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

    def finish(self, out: Path, records: Sequence[Record], progress: Progress) -> None:
        """The contact sheets."""
        if self.options.contact_sheet:
            shown = [record for record in records if record.get("colours") and "part" not in record]
            self.sheets = save_sheets(out, shown, self.suffix, progress)


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
