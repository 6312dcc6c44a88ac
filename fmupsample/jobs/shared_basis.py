"""The PCA basis that all drawings of a folder share: taken from an earlier run, or fitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from fmupsample.draw.pca import PCABasis, sample_tokens
from fmupsample.errors import FmupsampleError, OutputError, UsageError
from fmupsample.images.find import Source, printable, stamp
from fmupsample.jobs.visualize_options import VisualizeOptions
from fmupsample.pipeline import Item, Pipeline
from fmupsample.progress import Progress
from fmupsample.runs.job import Task
from fmupsample.runs.manifest import Manifest
from fmupsample.video.frames import Film, FrameSource

NAME = "basis.safetensors"
# A drawing made by another revision of this code is drawn again.
REVISION = 1
_MAX_TOKENS = 16_000  # three directions and their ranges have settled by then
_MAX_TOKEN_NUMBERS = 12_000_000  # tokens x channels that a basis is fitted on: 96 MB in float64
# A basis is fitted on at most so many images and videos, and frames of each video, evenly spaced.
_IMAGES, _FRAMES = 256, 32


class SharedBasis:
    """The basis of a run, as its options ask for it.

    Attributes:
        basis: ``None``: each image has its own, or it is not there yet.
    """

    def __init__(self, pipeline: Pipeline, options: VisualizeOptions) -> None:
        self.pipeline, self.options = pipeline, options
        self.basis: PCABasis | None = None
        self._metadata: dict[str, str] = {}

    def path(self, out: Path) -> Path | None:
        """Where it lies."""
        if self.options.basis == "image" or self.basis is None:
            return None
        return out / NAME if self.options.basis == "shared" else Path(self.options.basis)

    def look(self, out: Path, tasks: Sequence[Task], manifest: Manifest, overwrite: bool) -> None:
        """Take the one that was named, or that of an earlier run if its colours must stay, or may.

        Raises:
            UsageError: a basis of another backbone; drawings that stay have other colours.
        """
        if self.options.basis == "image":
            return
        if self.options.basis != "shared":
            self.basis = self._given(Path(self.options.basis))
            return
        model = {key: str(value) for key, value in self.pipeline.describe().items()}
        model |= {"foreground": str(self.options.foreground), "revision": str(REVISION)}
        images = _digest(list(dict.fromkeys(task.source for task in tasks)))
        self._metadata = {**model, "pictures": images}
        saved = _saved(out / NAME, overwrite)
        if saved is None:
            return
        same_model = all(saved.metadata.get(key) == value for key, value in model.items())
        wanted = {task.key for task in tasks}
        staying = [
            record
            for key, record in manifest.records.items()
            if key not in wanted and record.get("pca_fingerprint") == saved.fingerprint
        ]
        if same_model and (staying or saved.metadata.get("pictures") == images):
            self.basis = saved
        elif staying:
            raise UsageError(
                f"{printable(out)} holds {len(staying)} drawings of other pictures in the colours "
                "of another model: choose another output folder, name those pictures too, or "
                "--overwrite"
            )

    def _given(self, path: Path) -> PCABasis:
        backbone = self.pipeline.backbone
        basis = PCABasis.load(path)
        basis.check(
            backbone=backbone.name, layer=backbone.layer, channels=backbone.channels,
            where=printable(path),
        )  # fmt: skip
        return basis

    def join(self, out: Path, fingerprint: str | None) -> None:
        """In a process beside the first: load what that one has.

        Raises:
            FmupsampleError: it is not there, or another one.
        """
        if fingerprint is None:
            return
        path = out / NAME if self.options.basis == "shared" else Path(self.options.basis)
        self.basis = PCABasis.load(path)
        if self.basis.fingerprint != fingerprint:
            raise FmupsampleError(
                f"{printable(path)} is not the basis that the first process uses: do all processes "
                "see the same files?"
            )

    def fit(
        self,
        out: Path,
        sources: Sequence[Source],
        progress: Progress,
        tokens_of: Callable[[Item], Tensor],
        keep: Callable[[Item], None],
    ) -> None:
        """Fit and save it, if it is not there; images that cannot be used are left out.

        Args:
            tokens_of: gives what it is fitted on, ``[N, C]``.
            keep: is given each image with its features.

        Raises:
            OutputError: it cannot be saved.
        """
        if self.options.basis != "shared" or self.basis is not None:
            return
        fitted_on = [
            one
            for source in sources[:: max(1, -(-len(sources) // _IMAGES))]
            for one in (spread(source.frames) if isinstance(source, Film) else [source])
        ]
        progress.start(len(fitted_on), "features")
        tokens = list(self._sample(fitted_on, progress, tokens_of, keep))
        if tokens:
            together = torch.cat(tokens)
            metadata = {**self._metadata, "tokens": str(len(together))}
            self.basis = PCABasis.fit(together, metadata=metadata)
            self.basis.save(out / NAME)

    def _sample(
        self,
        sources: Sequence[Source],
        progress: Progress,
        tokens_of: Callable[[Item], Tensor],
        keep: Callable[[Item], None],
    ) -> Iterator[Tensor]:
        """Tokens ``[n, C]`` of each of ``sources``, as many of all."""
        most = min(_MAX_TOKENS, _MAX_TOKEN_NUMBERS // self.pipeline.backbone.channels)
        each = max(1, most // len(sources))
        for item in self.pipeline.items(sources, on_error=lambda *_: progress.advance()):
            yield sample_tokens(tokens_of(item).T[:, :, None], each).cpu()
            if not isinstance(item.source, FrameSource):
                keep(item)
            progress.advance()


def spread(frames: Sequence[FrameSource]) -> list[FrameSource]:
    """Those of a video that a basis is fitted on."""
    return list(frames[:: max(1, -(-len(frames) // _FRAMES))])


def frames_mark(source: Source) -> str | None:
    """Which part of a video is drawn, and how fast; ``None`` for an image."""
    if not isinstance(source, Film):
        return None
    text = f"{[frame.index for frame in source.frames]} {source.rate}"
    return sha256(text.encode()).hexdigest()[:12]


def _digest(sources: Sequence[Source]) -> str:
    lines = [f"{printable(s.absolute)} {stamp(s)}{frames_mark(s) or ''}" for s in sources]
    return sha256("\n".join(lines).encode()).hexdigest()[:16]


def _saved(path: Path, overwrite: bool) -> PCABasis | None:
    if not path.exists() or overwrite:
        return None
    try:
        return PCABasis.load(path)
    except UsageError as error:
        raise OutputError(
            f"{printable(path)} is in the way: it is not a PCA basis of this version; move it "
            "away, or give --overwrite"
        ) from error
