"""``visualize`` over several processes: the first plans, fits the basis and sums up.

Where a basis is to be fitted, each process computes the features of every n-th picture, and of
frames of every n-th video, and leaves a sample of them in a hidden file, from which the first fits
it. Then each draws its share: the same pictures, whose features it has, or every n-th of those that
are still to be drawn. Of the videos, longest first, each process draws one, and then whichever
nobody has begun. What a process that dies has not drawn is drawn by the next run.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from fmupsample.analysis.pca import PCABasis
from fmupsample.atomic import temporary_for
from fmupsample.distributed import Team
from fmupsample.errors import FmupsampleError, OutputError
from fmupsample.images.find import Source, printable
from fmupsample.pipeline import Pipeline
from fmupsample.progress import Progress
from fmupsample.sharing import (
    Counting,
    Together,
    end_of,
    pack_sources,
    refuse_other_options,
    share_of,
    shortly,
    unpack_sources,
)
from fmupsample.video.clips import Clip
from fmupsample.video.frames import frames_of
from fmupsample.visualization.album import BASIS_NAME, Album, AlbumPart
from fmupsample.visualization.run import Report, Run, VisualizeOptions


class LeadingRun(Run):
    """The run of the first process."""

    def __init__(
        self,
        pipeline: Pipeline,
        album: Album,
        options: VisualizeOptions,
        progress: Progress,
        clips: Sequence[Clip],
        team: Team,
    ) -> None:
        super().__init__(pipeline, album, options, progress, clips)
        self.team = team
        self._began = self._sampled = False

    def _begin(self, *, sampling: bool) -> None:
        """Let the others begin, by computing features or by waiting for what they draw."""
        if self._began:
            return
        self._began, self._sampled = True, sampling
        self.album.share()
        for rank in range(1, self.team.size):
            share = {"digest": _digest(self), "sample": None}
            if sampling:
                numbers, sources = self._share(rank)
                share["sample"] = {
                    "numbers": numbers,
                    "sources": pack_sources(sources),
                    "total": self._total,
                }
            self.team.post(share_of(rank), share)

    @functools.cached_property
    def _groups(self) -> list[tuple[int, list[Source]]]:
        """What a basis is fitted on, with the number of the first of each group."""
        groups = self._fitted_on()
        return list(zip(itertools.accumulate(map(len, groups), initial=0), groups, strict=False))

    @property
    def _total(self) -> int:
        return sum(len(group) for _, group in self._groups)

    def _share(self, rank: int) -> tuple[list[int], list[Source]]:
        """What a process samples, and its numbers among all: a video's frames are for one."""
        numbers: list[int] = []
        sources: list[Source] = []
        for first, group in self._groups[rank :: self.team.size]:
            numbers += range(first, first + len(group))
            sources += group
        return numbers, sources

    def _sample(self) -> Tensor | None:
        self._begin(sampling=True)
        team, progress, total = self.team, self.progress, self._total
        together = self.progress = Together(progress, team, total)
        try:
            numbers, sources = self._share(0)
            samples = self._samples(sources, numbers, total)
            for rank in range(1, team.size):
                team.wait(_features_of(rank), together.look, by=rank)
                theirs = team.fetch(_features_of(rank))
                self._hear(theirs["failed"], self._share(rank)[1])
                samples |= self._read(theirs["samples"])
            together.look()
        finally:
            self.progress = progress
        return torch.cat([samples[n] for n in sorted(samples)]) if samples else None

    def _read(self, name: str) -> dict[int, Tensor]:
        """The sample of another process, whose file goes."""
        path = self.album.log_folder / name
        try:
            found = load(path.read_bytes())
            path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                f"{printable(path)}, left by another process, cannot be read "
                f"({error.strerror}): do all processes write into one and the same folder?"
            ) from error
        return {int(number): tokens for number, tokens in found.items()}

    def _draw(self, todo: list[Source], films: list[Clip]) -> None:
        self._begin(sampling=False)
        films = sorted(films, key=lambda clip: len(clip.frames), reverse=True)
        for number, clip in enumerate(films):
            self.team.post(_film(number), _pack_film(clip, self.album))
        team, progress, wanted = self.team, self.progress, set(todo)
        order = self.sources if self._sampled else todo
        shares = [[s for s in order[rank :: team.size] if s in wanted] for rank in range(team.size)]
        for rank, share in enumerate(shares[1:], start=1):
            drawings = {
                "sources": pack_sources(share),
                "album": self.album.pack(share),
                "films": len(films),
                "basis": self.basis and self.basis.fingerprint,
            }
            team.post(_drawings_of(rank), drawings)
        total = len(todo) + sum(map(self._steps, films))
        together = self.progress = Together(progress, team, total)
        try:
            if total:
                together.start(total, "drawing")
            self._draw_pictures(shares[0])
            for number in _taken(team, len(films)):
                self._film(films[number])
            self._sum_up(shares, films, together.look)
        except KeyboardInterrupt:
            # They were interrupted as well. One that does not end keeps its own part of the log,
            # which the next run merges.
            with contextlib.suppress(FmupsampleError, TimeoutError):
                self._sum_up(shares, films, shortly())
            raise
        finally:
            self.progress = progress

    def _sum_up(
        self, shares: list[list[Source]], films: list[Clip], meanwhile: Callable[[], None]
    ) -> None:
        """Wait for all, and report what they did."""
        for rank in range(1, self.team.size):
            self.team.wait(end_of(rank), meanwhile, by=rank)
        meanwhile()
        known = self.album.absorb()
        for rank in range(1, self.team.size):
            end = self.team.fetch(end_of(rank))
            for name in end["drawn"]:
                if name not in known:
                    raise OutputError(
                        f"what became of {printable(self.album.path(name))} is not recorded: do "
                        "all processes write into one and the same folder?"
                    )
                self.report.drawn.append(self.album.path(name))
            taken = [films[number].source for number in end["films"]]
            self._hear(end["failed"], [*shares[rank], *taken])
        named = (self.album.names, *self.album.point_names.values())
        order = [self.album.path(names[s]) for s in self.album.names for names in named]
        place = {path: number for number, path in enumerate(order)}
        self.report.drawn.sort(key=place.__getitem__)

    def _hear(self, failed: list[tuple[int, str]], sources: Sequence[Source]) -> None:
        """Report the pictures and videos that another process could not use."""
        for number, error in failed:
            source = printable(sources[number].path)
            self.report.failed.append({"source": source, "error": error})
            self.progress.warn(error)


class HelpingRun(Run):
    """The run of a process that is not the first; nothing is said to the user."""

    album: AlbumPart

    def __init__(
        self,
        pipeline: Pipeline,
        album: AlbumPart,
        options: VisualizeOptions,
        progress: Progress,
    ) -> None:
        super().__init__(pipeline, album, options, progress)
        self.films: list[int] = []  # numbers of those that it has begun

    def leave_samples(self, sample: dict[str, Any], team: Team) -> None:
        """Compute the features of a share, and leave what the basis is fitted on."""
        sources = unpack_sources(sample["sources"])
        samples = self._samples(sources, sample["numbers"], sample["total"])
        # Under the name of a temporary file: what a run that is killed leaves of it goes with them.
        path = temporary_for(self.album.log_folder / "samples")
        try:
            path.write_bytes(save({str(n): t.contiguous() for n, t in samples.items()}))
        except OSError as error:
            raise OutputError(f"{printable(path)} cannot be written: {error.strerror}") from error
        failed, self.report.failed = _numbered(self.report.failed, sources), []
        team.post(_features_of(team.rank), {"samples": path.name, "failed": failed})

    def draw(self, drawings: dict[str, Any], team: Team) -> None:
        """Draw a share."""
        sources = unpack_sources(drawings["sources"])
        self.album.take(sources, drawings["album"])
        if drawings["basis"] is not None:
            shared = self.options.basis == "shared"
            path = self.output / BASIS_NAME if shared else Path(self.options.basis)
            self.basis = PCABasis.load(path)
            if self.basis.fingerprint != drawings["basis"]:
                raise FmupsampleError(
                    f"{printable(path)} is not the basis that the first process uses: do all "
                    "processes see the same files?"
                )
        self.progress.start(len(sources), "drawing")
        self._draw_pictures(sources)
        for number in _taken(team, drawings["films"]):
            packed = team.fetch(_film(number))
            clip = _unpack_clip(packed)
            self.album.take([clip.source], packed["album"])
            self.films.append(number)
            self.frames = frames_of([clip])
            self._film(clip)

    def end(self) -> dict[str, Any]:
        """What was done."""
        return {
            "drawn": [path.relative_to(self.output).as_posix() for path in self.report.drawn],
            "failed": _numbered(self.report.failed, self.album.sources),
            "films": self.films,
        }


def help_out(pipeline: Pipeline, output: Path, options: VisualizeOptions, team: Team) -> Report:
    """Do the share of a process that is not the first.

    Raises:
        FmupsampleError: it has other models, options or files than the first.
    """
    share = team.fetch(share_of(team.rank))
    album = AlbumPart(
        output,
        team.rank,
        image_format=options.image_format,
        points=options.points,
        overwrite=options.overwrite,
    )
    run = HelpingRun(pipeline, album, options, Counting(team))
    try:
        refuse_other_options(share["digest"] == _digest(run), team)
        if share["sample"] is not None:
            run.leave_samples(share["sample"], team)
        run.draw(team.fetch(_drawings_of(team.rank)), team)
    except KeyboardInterrupt:
        album.close()
        team.post(end_of(team.rank), run.end())
        raise
    finally:
        album.close()
    team.post(end_of(team.rank), run.end())
    return run.report


def _digest(run: Run) -> str:
    """Of all that must be the same in all processes."""
    upsampler = run.pipeline.upsampler
    method = [upsampler.name, upsampler.fingerprint or ""]
    what = json.dumps([run._model(), method, repr(run.options)], sort_keys=True)
    return hashlib.sha256(what.encode()).hexdigest()[:16]


def _numbered(failed: list[dict[str, str]], sources: Sequence[Source]) -> list[tuple[int, str]]:
    """Failures by the number of the picture: its path may be another one for another process."""
    numbers = {printable(source.path): number for number, source in enumerate(sources)}
    return [(numbers[f["source"]], f["error"]) for f in failed if f["source"] in numbers]


def _taken(team: Team, count: int) -> Iterator[int]:
    """Numbers below ``count``, each for one process: that of its rank, then what nobody has."""
    number = team.rank
    while number < count:
        yield number
        number = team.size - 1 + team.add("films begun", 1)


def _pack_film(clip: Clip, album: Album) -> dict[str, Any]:
    """A video, and what another process must know to draw it, as plain values."""
    return {
        "source": pack_sources([clip.source]),
        "clip": {name: value for name, value in vars(clip).items() if name != "source"},
        "album": album.pack([clip.source]),
    }


def _unpack_clip(packed: dict[str, Any]) -> Clip:
    """The video of :func:`_pack_film`."""
    [source] = unpack_sources(packed["source"])
    facts = packed["clip"]
    lists = {name: tuple(facts[name]) for name in ("size", "frames", "times")}
    return Clip(source, **{**facts, **lists})


def _film(number: int) -> str:
    return f"film {number}"


def _features_of(rank: int) -> str:
    return f"features of {rank}"


def _drawings_of(rank: int) -> str:
    return f"drawings of {rank}"
