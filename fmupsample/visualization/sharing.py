"""``visualize`` over several processes: the first plans, fits the basis and sums up.

Where a basis is to be fitted, each process computes the features of every n-th picture and leaves a
sample of them in a hidden file, from which the first fits it. Then each draws its share: the same
pictures, whose features it has, or every n-th of those that are still to be drawn. What a process
that dies has not drawn is drawn by the next run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
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
        team: Team,
    ) -> None:
        super().__init__(pipeline, album, options, progress)
        self.team = team
        self._began = self._sampled = False

    def _begin(self, *, sampling: bool) -> None:
        """Let the others begin, by computing features or by waiting for what they draw."""
        if self._began:
            return
        self._began, self._sampled = True, sampling
        self.album.share()
        for rank in range(1, self.team.size):
            share = {
                "digest": _digest(self),
                "pictures": pack_sources(self._share(rank)) if sampling else None,
                "total": len(self.sources),
            }
            self.team.post(share_of(rank), share)

    def _share(self, rank: int) -> list[Source]:
        return self.sources[rank :: self.team.size]

    def _sample(self) -> Tensor | None:
        self._begin(sampling=True)
        team, progress, total = self.team, self.progress, len(self.sources)
        together = self.progress = Together(progress, team, total)
        try:
            samples = self._samples(self._share(0), range(0, total, team.size), total)
            for rank in range(1, team.size):
                team.wait(_features_of(rank), together.look, by=rank)
                theirs = team.fetch(_features_of(rank))
                self._hear(theirs["failed"], self._share(rank))
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

    def _draw(self, todo: list[Source]) -> None:
        self._begin(sampling=False)
        team, progress, wanted = self.team, self.progress, set(todo)
        order = self.sources if self._sampled else todo
        shares = [[s for s in order[rank :: team.size] if s in wanted] for rank in range(team.size)]
        for rank, share in enumerate(shares[1:], start=1):
            drawings = {
                "sources": pack_sources(share),
                "album": self.album.pack(share),
                "basis": self.basis and self.basis.fingerprint,
            }
            team.post(_drawings_of(rank), drawings)
        together = self.progress = Together(progress, team, len(todo))
        try:
            if todo and not shares[0]:
                together.start(0, "drawing")
            super()._draw(shares[0])
            self._sum_up(shares, together.look)
        except KeyboardInterrupt:
            # They were interrupted as well. One that does not end keeps its own part of the log,
            # which the next run merges.
            with contextlib.suppress(FmupsampleError, TimeoutError):
                self._sum_up(shares, shortly())
            raise
        finally:
            self.progress = progress

    def _sum_up(self, shares: list[list[Source]], meanwhile: Callable[[], None]) -> None:
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
            self._hear(end["failed"], shares[rank])
        named = (self.album.names, *self.album.point_names.values())
        order = [self.album.path(names[s]) for s in self.sources for names in named]
        place = {path: number for number, path in enumerate(order)}
        self.report.drawn.sort(key=place.__getitem__)

    def _hear(self, failed: list[tuple[int, str]], sources: Sequence[Source]) -> None:
        """Report the pictures that another process could not use."""
        for number, error in failed:
            self.report.failed.append({"source": str(sources[number]), "error": error})
            self.progress.warn(error)


class HelpingRun(Run):
    """The run of a process that is not the first; nothing is said to the user."""

    album: AlbumPart

    def leave_samples(self, share: dict[str, Any], team: Team) -> None:
        """Compute the features of a share, and leave what the basis is fitted on."""
        sources, total = unpack_sources(share["pictures"]), share["total"]
        samples = self._samples(sources, range(team.rank, total, team.size), total)
        # Under the name of a temporary file: what a run that is killed leaves of it goes with them.
        path = temporary_for(self.album.log_folder / "samples")
        try:
            path.write_bytes(save({str(n): t.contiguous() for n, t in samples.items()}))
        except OSError as error:
            raise OutputError(f"{printable(path)} cannot be written: {error.strerror}") from error
        failed, self.report.failed = _numbered(self.report.failed, sources), []
        team.post(_features_of(team.rank), {"samples": path.name, "failed": failed})

    def draw(self, drawings: dict[str, Any]) -> None:
        """Draw a share."""
        self.sources = unpack_sources(drawings["sources"])
        self.album.take(self.sources, drawings["album"])
        if drawings["basis"] is not None:
            shared = self.options.basis == "shared"
            path = self.output / BASIS_NAME if shared else Path(self.options.basis)
            self.basis = PCABasis.load(path)
            if self.basis.fingerprint != drawings["basis"]:
                raise FmupsampleError(
                    f"{printable(path)} is not the basis that the first process uses: do all "
                    "processes see the same files?"
                )
        self._draw(self.sources)

    def end(self) -> dict[str, Any]:
        """What was done."""
        return {
            "drawn": [path.relative_to(self.output).as_posix() for path in self.report.drawn],
            "failed": _numbered(self.report.failed, self.sources),
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
        if share["pictures"] is not None:
            run.leave_samples(share, team)
        run.draw(team.fetch(_drawings_of(team.rank)))
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
    method = [upsampler.name, getattr(upsampler, "fingerprint", "")]
    what = json.dumps([run._model(), method, repr(run.options)], sort_keys=True)
    return hashlib.sha256(what.encode()).hexdigest()[:16]


def _numbered(failed: list[dict[str, str]], sources: Sequence[Source]) -> list[tuple[int, str]]:
    """Failures by the number of the picture: its path may be another one for another process."""
    numbers = {str(source): number for number, source in enumerate(sources)}
    return [(numbers[f["source"]], f["error"]) for f in failed if f["source"] in numbers]


def _features_of(rank: int) -> str:
    return f"features of {rank}"


def _drawings_of(rank: int) -> str:
    return f"drawings of {rank}"
