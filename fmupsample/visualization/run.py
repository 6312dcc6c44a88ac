"""Draw the features of many pictures: one PCA basis for all, one drawing each, contact sheets.

Videos are drawn after the pictures, see :mod:`.films`; the basis is fitted on some of their frames.

With a shared basis there are two passes: the first computes features and keeps a sample of tokens
for the basis, the second draws. Features of the first pass are kept in memory (half precision) up
to a bound; beyond it they are computed again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmupsample.analysis.pca import PCABasis, sample_tokens
from fmupsample.backbones.views import title
from fmupsample.distributed import Team
from fmupsample.errors import FmupsampleError, ImageError, OutputError, UsageError
from fmupsample.images.find import Source, printable
from fmupsample.images.size import check_output_size
from fmupsample.pipeline import Item, Pipeline
from fmupsample.progress import SILENT, Progress
from fmupsample.threads import models_take_all_cores
from fmupsample.video.clips import Clip
from fmupsample.video.frames import FrameSource, frames_of
from fmupsample.visualization.album import BASIS_NAME, FORMATS, Album, stamp_text
from fmupsample.visualization.draw import LAYOUTS, Artist, Drawing, Layout, Point
from fmupsample.visualization.films import FilmArtist, Filming, check_point, spread
from fmupsample.visualization.passes import FeatureCache, Saver
from fmupsample.writers.lock import FolderLock

# A drawing made by another revision of this code is drawn again.
_REVISION = 1
_MAX_TOKENS = 16_000  # three directions and their ranges have settled by then
_MOST_DRAWINGS = 4  # at once: each holds a picture and its maps
_BYTES_PER_PIXEL = 27  # of a canvas whose drawing waits: it, the same normalised, three maps
_MAX_TOKEN_NUMBERS = 12_000_000  # tokens x channels that a basis is fitted on: 96 MB in float64


@dataclass(frozen=True)
class VisualizeOptions:
    """What to draw.

    Attributes:
        layout: ``"panel"``, ``"single"`` or ``"overlay"``, see :class:`.draw.Artist`.
        basis: ``"shared"`` (one PCA basis for all pictures of the run), ``"image"`` (each its
            own), or the path of a basis saved by an earlier run.
        foreground: fit and draw the PCA on each picture's foreground only.
        points: pixels of the original pictures for similarity maps.
        image_format: ``"png"`` or ``"jpg"``.
        output_size: of single and overlay pictures (image, original, HxW, xN).
        contact_sheet: make one, of two pictures or more.
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
        pictures: how many there were.
        clips: the videos, see :class:`fmupsample.video.Clip`.
        drawn: files written, in the order of the pictures, then of the videos.
        skipped: pictures and videos all of whose files were there already.
        failed: ``{"source": ..., "error": ...}`` for each picture or video with a fault.
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
    progress: Progress = SILENT,
    team: Team | None = None,
) -> Report:
    """Draw ``sources`` into the folder ``output``, and videos (``clips``) as videos.

    Pictures that cannot be read or drawn are reported and left out; what an earlier run with the
    same options finished is not done again.

    Args:
        team: processes that share the work, see :mod:`.sharing`. The first is given all
            pictures and videos; the others none, and their report is of their own share.

    Raises:
        UsageError: options that cannot be honoured, a basis of another backbone.
        OutputError: the folder cannot be written, the disk is full.
        ProcessError: another process has failed; what is finished stays.
    """
    options = options or VisualizeOptions()
    options.check(videos=bool(clips))
    if team is not None:
        from fmupsample.visualization.sharing import LeadingRun, help_out  # which is a Run

        if not team.leads:
            return help_out(pipeline, Path(output), options, team)
    with FolderLock(Path(output)):
        album = Album(
            Path(output),
            sources,
            image_format=options.image_format,
            points=options.points,
            overwrite=options.overwrite,
            videos=[clip.source for clip in clips if not clip.error],
        )
        if team is None:
            run = Run(pipeline, album, options, progress, clips)
        else:
            run = LeadingRun(pipeline, album, options, progress, clips, team)
        try:
            return run.run()
        finally:
            run.album.close()


class Run:
    """The state of one run over the pictures of ``album``; :meth:`run` does the work."""

    def __init__(
        self,
        pipeline: Pipeline,
        album: Album,
        options: VisualizeOptions,
        progress: Progress,
        clips: Sequence[Clip] = (),
    ) -> None:
        self.pipeline, self.album = pipeline, album
        self.sources, self.output = album.sources, album.folder
        self.options, self.progress = options, progress
        self.clips = clips
        self.frames = frames_of(clips)
        shared = options.basis != "image"
        self.artist = Artist(
            pipeline,
            layout=options.layout,
            output_size=options.output_size,
            foreground=options.foreground,
            note=f"{title(pipeline.backbone)}, PCA of {'the run' if shared else 'this picture'}",
        )
        self.report = Report(self.output, len(self.sources), clips)
        self.basis: PCABasis | None = None
        self.cache = FeatureCache(pipeline, options.cache_bytes)

    def run(self) -> Report:
        began = time.monotonic()
        for clip in self.clips:
            if clip.error:
                self._failed(clip.source, ImageError(clip.error), step=0)
        if self.options.basis != "image":
            self.basis = self._basis()
        todo = [source for source in self.sources if self._wanted(source)]
        films = [c for c in self.clips if not c.error and self._wanted(c.source, c)]
        there = len(self.sources) + sum(not clip.error for clip in self.clips)
        self.report.skipped = there - len(todo) - len(films)
        bad = {failure["source"] for failure in self.report.failed}
        self._draw(
            [source for source in todo if str(source) not in bad],
            [clip for clip in films if str(clip.source) not in bad],
        )
        if self.options.contact_sheet:
            self.report.sheets = self.album.save_sheets(self.progress)
        self.report.seconds = time.monotonic() - began
        return self.report

    # -- the basis ----------------------------------------------------------------------------

    def _model(self) -> dict[str, str]:
        """What the features, and so a basis, depend on."""
        backbone, pipeline = self.pipeline.backbone, self.pipeline
        more = {} if pipeline.window is None else {"window": str(pipeline.window)}
        if getattr(backbone, "views", 1) != 1:
            more["views"] = str(backbone.views)
        return {
            **more,
            "backbone": backbone.name,
            "layer": str(backbone.layer),
            "backbone_fingerprint": backbone.fingerprint,
            "image_size": str(pipeline.image_size or backbone.default_image_size),
            "fit": pipeline.fit,
            "precision": pipeline.precision,
            "foreground": str(self.options.foreground),
        }

    def _basis(self) -> PCABasis | None:
        backbone = self.pipeline.backbone
        if self.options.basis != "shared":
            path = Path(self.options.basis)
            basis = PCABasis.load(path)
            basis.check(
                backbone=backbone.name, layer=backbone.layer, channels=backbone.channels,
                where=printable(path),
            )  # fmt: skip
            self.report.basis = path
            return basis
        path = self.output / BASIS_NAME
        lines = [stamp_text(source) for source in self.sources]
        lines += [f"{stamp_text(clip.source)} {clip.frames}" for clip in self.clips]
        pictures = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        metadata = {**self._model(), "pictures": pictures[:16], "revision": str(_REVISION)}
        basis = self._saved_basis(path, metadata)
        if basis is None:
            tokens = self._sample()
            if tokens is None:
                return None  # not one picture could be read
            metadata["tokens"] = str(len(tokens))
            basis = PCABasis.fit(tokens, metadata=metadata)
            basis.save(path)
        self.report.basis = path
        self.report.explained = float(basis.explained.sum())
        return basis

    def _saved_basis(self, path: Path, metadata: dict[str, str]) -> PCABasis | None:
        """The basis of an earlier run on the same pictures with the same model."""
        if not path.exists():
            return None
        try:
            basis = PCABasis.load(path)
        except UsageError as error:
            if self.options.overwrite:
                return None
            raise OutputError(
                f"{printable(path)} is in the way: it is not a PCA basis of this version; move it "
                "away, or give --overwrite"
            ) from error
        same = all(basis.metadata.get(key) == value for key, value in metadata.items())
        return basis if same and not self.options.overwrite else None

    def _sample(self) -> Tensor | None:
        """Tokens ``[N, C]`` spread evenly over all pictures and over frames of each video.

        Fills the cache on the way.
        """
        sources = [source for group in self._fitted_on() for source in group]
        samples = self._samples(sources, range(len(sources)), len(sources))
        return torch.cat(list(samples.values())) if samples else None

    def _fitted_on(self) -> list[list[Source]]:
        """What a basis is fitted on: each picture, and then frames of each video."""
        clips = [clip for clip in self.clips if not clip.error]
        return [
            *([source] for source in self.sources),
            *(spread(self.frames[clip.source]) for clip in clips),
        ]

    def _samples(
        self, sources: Sequence[Source], numbers: Sequence[int], total: int
    ) -> dict[int, Tensor]:
        """Tokens ``[n, C]`` of these pictures and frames, by their ``numbers`` among ``total``."""
        if not sources:
            return {}
        most = min(_MAX_TOKENS, _MAX_TOKEN_NUMBERS // self.pipeline.backbone.channels)
        each = max(1, most // total)
        every = -(-total // most)  # more pictures than tokens: some give none
        number = dict(zip(sources, numbers, strict=True))
        samples = {}
        self.progress.start(len(sources), "features")
        for item in self.pipeline.items(sources, on_error=self._failed):
            n = number[item.source]
            if n % every == 0:
                tokens = self.artist.basis_tokens(item)
                samples[n] = sample_tokens(tokens.T[:, :, None], each).cpu()
            if not isinstance(item.source, FrameSource):
                self.cache.add(item)
            self.progress.advance()
        return samples

    # -- the drawings -------------------------------------------------------------------------

    def _recipe(self, point: Point | None, clip: Clip | None = None) -> str:
        """Digest of all that decides how a drawing looks, but for the photograph itself."""
        options, upsampler = self.options, self.pipeline.upsampler
        what: dict[str, Any] = {
            **self._model(),
            "upsampler": [upsampler.name, upsampler.fingerprint or ""],
            "format": options.image_format,
            "revision": _REVISION,
        }
        if point is None:
            basis = self.basis.fingerprint if self.basis else "image"
            what |= {"layout": options.layout, "size": options.output_size, "basis": basis}
        else:
            del what["foreground"]
        if clip is not None:
            del what["format"]
            what["frames"] = [clip.frames, clip.rate]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

    def _wanted(self, source: Source, clip: Clip | None = None) -> list[Point | None]:
        """What is still to be drawn of a picture or video: ``None`` is the PCA picture."""
        kinds = (None, *self.options.points)
        return [p for p in kinds if not self.album.is_drawn(source, self._recipe(p, clip), p)]

    def _film(self, clip: Clip) -> None:
        """Draw a video; one that fails is reported."""
        steps = self._steps(clip)
        wanted = {point: self._recipe(point, clip) for point in self._wanted(clip.source, clip)}
        for point in [p for p in wanted if p is not None]:
            try:
                check_point(clip, point)
            except ImageError as error:
                self._failed(clip.source, error, step=0)
                del wanted[point]
        if not wanted:
            self.progress.advance(steps)
            return
        filming = Filming(self._film_artist(), self.album, self.progress)
        try:
            frames = self.frames[clip.source]
            self.report.drawn += filming.draw(clip, frames, self.basis, wanted)
        except OutputError:
            raise
        except FmupsampleError as error:
            self._failed(clip.source, error, step=steps - filming.steps)

    def _steps(self, clip: Clip) -> int:
        """How often drawing this video advances: once a frame, more for a basis of its own."""
        frames = self.frames[clip.source]
        own = self.basis is None and None in self._wanted(clip.source, clip)
        return len(frames) + (len(spread(frames)) if own else 0)

    def _film_artist(self) -> FilmArtist:
        options = self.options
        shown = "this video" if self.basis is None else "the run"
        return FilmArtist(
            self.pipeline,
            layout=options.layout,
            output_size=options.output_size,
            note=f"{title(self.pipeline.backbone)}, PCA of {shown}",
        )

    def _draw(self, todo: list[Source], films: list[Clip]) -> None:
        """Draw pictures, then videos, of which something is wanted."""
        if not todo and not films:
            return
        self.progress.start(len(todo) + sum(map(self._steps, films)), "drawing")
        self._draw_pictures(todo)
        for clip in films:
            self._film(clip)

    def _draw_pictures(self, todo: list[Source]) -> None:
        in_turns = 0
        if models_take_all_cores(self.pipeline.device):
            in_turns = min(torch.get_num_threads(), _MOST_DRAWINGS)
        with Saver(self._save, self._saved, in_turns) as saver:
            for item in self.cache.items(todo, on_error=self._failed):
                size = _BYTES_PER_PIXEL * item.frame.canvas[0] * item.frame.canvas[1]
                for point, drawing in self._drawings(item, self._wanted(item.source)):
                    saver.put(item.source, drawing, point, size)
                self.progress.advance()

    def _drawings(
        self, item: Item, wanted: list[Point | None]
    ) -> Iterator[tuple[Point | None, Callable[[], Drawing]]]:
        points = [point for point in wanted if point is not None]
        if None in wanted:
            try:
                basis = self.basis or PCABasis.fit(self.artist.basis_tokens(item))
                yield None, self.artist.prepare_pca(item, basis)
            except FmupsampleError as error:
                self._failed(item.source, error, step=0)
        drawings = self.artist.draw_similarity(item, points)
        for point, drawing in zip(points, drawings, strict=True):
            if isinstance(drawing, Drawing):
                yield point, lambda drawing=drawing: drawing
            else:
                self._failed(item.source, drawing, step=0)

    def _save(self, source: Source, draw: Callable[[], Drawing], point: Point | None) -> Path:
        return self.album.save(source, draw(), self._recipe(point), point)

    def _saved(self, source: Source, result: Path | FmupsampleError) -> None:
        if isinstance(result, Path):
            self.report.drawn.append(result)
        elif isinstance(result, OutputError):
            raise result
        else:
            self._failed(source, result, step=0)

    def _failed(self, source: Source, error: FmupsampleError, step: int = 1) -> None:
        # Of a frame, its video.
        self.report.failed.append({"source": printable(source.path), "error": str(error)})
        self.progress.warn(str(error))
        if step:
            self.progress.advance(step)
