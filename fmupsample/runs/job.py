"""What a run does for each image: the part of a command that is not the engine's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch

from fmupsample.formats.files import TensorFile
from fmupsample.images.find import Source, storable
from fmupsample.pipeline import Item, Pipeline
from fmupsample.progress import Progress
from fmupsample.runs.manifest import Manifest, Record


@dataclass(frozen=True, eq=False)
class Task:
    """One result: a file of the output folder, made from one image or video.

    Attributes:
        output: its name, relative to the output folder.
        part: which of the results of this source it is, where there are several.
        beside: names of further files that are made along with it.
    """

    source: Source
    output: PurePosixPath
    part: str = ""
    beside: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What the manifest knows it by."""
        name = storable(self.source.absolute)
        return f"{name}#{self.part}" if self.part else name


class Recipe(NamedTuple):
    """All that decides the numbers in a result, and 12 hex digits of it."""

    options: dict[str, Any]
    hash: str

    @classmethod
    def of(cls, options: dict[str, Any]) -> Recipe:
        """Equal options give equal hashes."""
        text = json.dumps(options, sort_keys=True).encode()
        return cls(options, hashlib.sha256(text).hexdigest()[:12])


@dataclass(eq=False)
class Output:
    """One file to be written.

    Attributes:
        kind: makes the file, of its path, ``shape``, ``dtype`` and ``meta``.
        record: for the manifest; status and bytes are filled in by the writer.
        extension: of the temporary name, where the file's own writer goes by that.
        beside: gives the bytes of each file ``beside`` the task's. They take their names before the
            output does: where it is, they are.
    """

    task: Task
    kind: Callable[..., TensorFile]
    shape: tuple[int, ...]
    dtype: torch.dtype
    meta: dict[str, str]
    record: Record
    extension: str = ""
    beside: Sequence[Callable[[], bytes]] = ()


class Fault(NamedTuple):
    """One result of an image cannot be made, while others can."""

    task: Task
    reason: str


# What a job gives the engine: a file, then what goes into it (a tensor, or what its kind takes).
Made = Output | Fault | tuple[Output, Any]


@dataclass
class Job:
    """What is written for each image. The engine calls the methods in the order given here.

    Attributes:
        label: what progress calls the work.
        smaller: advice where one result does not fit into memory.
        redoes: results made with other options are made again; otherwise the run is refused.
        log: the folder of the manifest, below the output folder.
        suffix: of the files, with its dot.
        shard_size: results go into tar files of so many; ``None``: a file each.
    """

    pipeline: Pipeline
    label: str = field(default="", init=False)
    smaller: str = field(default="use a smaller --image-size", init=False)
    redoes: bool = field(default=False, init=False)
    log: str = field(default="", init=False)
    suffix: str = field(default="", init=False)
    shard_size: int | None = field(default=None, init=False)

    def tasks(self, sources: Sequence[Source]) -> list[Task]:
        """The results of all sources; those of one source follow each other."""
        raise NotImplementedError

    def recipe(self, task: Task | None = None) -> Recipe:
        """What decides a result; ``None``: what those of this job have in common."""
        raise NotImplementedError

    def look(self, out: Path, tasks: Sequence[Task], manifest: Manifest, overwrite: bool) -> None:
        """Look at what earlier runs left in ``out``, before anything is planned or written.

        Raises:
            UsageError: this job cannot go on with that.
        """

    def is_current(self, task: Task, record: Record) -> bool:
        """Whether a finished result of the same recipe still counts as finished."""
        return True

    def bytes_of(self, size: tuple[int, int]) -> int | None:
        """About how large the result of an image of ``(H, W)`` is; ``None``: no matter."""
        return None

    def smaller_ways(self) -> dict[str, Job]:
        """Jobs whose results take less space, by what to type for them."""
        return {}

    def prepare(self, out: Path, sources: Sequence[Source], progress: Progress) -> None:
        """Make what all results share, such as a PCA basis; by one process only."""

    def facts(self) -> dict[str, Any]:
        """What other processes must find as this one does (JSON), such as a fingerprint."""
        return {}

    def join(self, out: Path, facts: dict[str, Any]) -> None:
        """In a process beside the first: find what the first one has made.

        Args:
            facts: of the first.

        Raises:
            FmupsampleError: it is not there, or another one.
        """

    def steps(self, tasks: Sequence[Task]) -> int:
        """How often :meth:`outputs` of a source calls ``advance``; the engine counts its images."""
        return 0

    def items(
        self, sources: Iterable[Source], on_error: Callable[[Source, Exception], None]
    ) -> Iterator[Item]:
        """The features of images."""
        return self.pipeline.items(sources, on_error=on_error)

    def outputs(
        self, tasks: Sequence[Task], items: Iterator[Item], advance: Callable[[], None]
    ) -> Iterator[Made]:
        """Make the results of one source.

        Args:
            tasks: all of one source.
            items: the image; of a video, its frames.

        Raises:
            FmupsampleError: they cannot be made.
        """
        raise NotImplementedError

    def finish(self, out: Path, records: Sequence[Record], progress: Progress) -> None:
        """Write what tells about all results of a run: legends, contact sheets; by one process.

        Args:
            records: of all results there are, in the order of the sources.
        """

    def note(self, todo: int) -> str:
        """A remark to end the estimate with."""
        views = getattr(self.pipeline.backbone, "views", 1)
        return f"; {views} passes of the backbone for each" if todo and views != 1 else ""
