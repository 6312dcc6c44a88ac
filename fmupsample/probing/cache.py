"""Frozen features and kernel weights, made once per picture and read in every epoch.

    store = MemoryStore()                       # or DiskStore("cache/")
    pictures = encode(pipeline, find_images(["photos"]), store, flips=True)
    seen = pictures[0].view(flipped=True)       # .features [C, h, w], .weights [N, H, W]

An entry is known by the picture's content, the size at which it is shown, whether it is flipped,
the backbone, and for kernel weights the upsampler. All of it is kept in half precision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fmupsample.atomic import replacing
from fmupsample.device import autocast
from fmupsample.errors import OutputError, UsageError
from fmupsample.images.find import Source
from fmupsample.images.prepare import normalise
from fmupsample.pipeline import Pipeline
from fmupsample.prefetch import prefetch
from fmupsample.progress import SILENT, Progress

_LARGEST_HALF = torch.finfo(torch.float16).max


class Store(Protocol):
    """Where tensors are kept, by key."""

    def get(self, key: str) -> Tensor | None:
        """What was put under ``key``, or ``None``."""

    def put(self, key: str, tensor: Tensor) -> None:
        """Keep ``tensor`` (on the CPU)."""

    def room_for(self, size: int) -> None:
        """Raise a UsageError if ``size`` more bytes cannot be kept."""

    def forget(self, prefix: str) -> None:
        """Drop everything whose key begins with ``prefix``."""


class MemoryStore:
    """Keeps tensors in memory, up to a limit in bytes."""

    def __init__(self, limit: int = 4 << 30) -> None:
        self.limit, self.used = limit, 0
        self._kept: dict[str, Tensor] = {}

    def get(self, key: str) -> Tensor | None:
        return self._kept.get(key)

    def put(self, key: str, tensor: Tensor) -> None:
        if key not in self._kept:
            self.room_for(tensor.nbytes)
            self._kept[key] = tensor
            self.used += tensor.nbytes

    def room_for(self, size: int) -> None:
        if self.used + size > self.limit:
            raise UsageError(
                f"features and kernel weights need {(self.used + size) / 1e9:.1f} GB of memory, "
                f"more than the limit of {self.limit / 1e9:.1f} GB: keep them on disk (give a "
                "cache folder), show the pictures smaller, or take fewer"
            )

    def forget(self, prefix: str) -> None:
        for key in [key for key in self._kept if key.startswith(prefix)]:
            self.used -= self._kept.pop(key).nbytes


class DiskStore:
    """Keeps each tensor in a safetensors file of a folder, mapped into memory when read.

    A file is there whole or not at all. The folder may be shared by runs, and deleted at any time
    between them; it grows with every picture, size, backbone and upsampler.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def get(self, key: str) -> Tensor | None:
        try:
            return load_file(self._path(key))["tensor"]
        except (OSError, SafetensorError, KeyError):
            return None  # missing, or damaged: it is made again

    def put(self, key: str, tensor: Tensor) -> None:
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_bytes(save({"tensor": tensor.contiguous()}))
        except OSError as error:
            raise OutputError(f"the cache {self.folder} cannot be written: {error}") from error

    def room_for(self, size: int) -> None:
        pass  # the disk says so itself

    def forget(self, prefix: str) -> None:
        for path in self.folder.glob(f"{escape(prefix)}*.safetensors"):
            path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


@dataclass(frozen=True)
class View:
    """What a probe sees of a picture.

    Attributes:
        features: ``[C, h, w]``, float16 (float32 if they exceed its range).
        weights: ``[N, H, W]``, float16.
    """

    features: Tensor
    weights: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """``(H, W)`` of the upsampled map."""
        return self.weights.shape[1], self.weights.shape[2]


@dataclass(frozen=True)
class EncodedPicture:
    """A picture whose views lie in a store."""

    source: Source
    keys: tuple[tuple[str, str], ...]  # of features and weights: as it is, and flipped
    store: Store

    def view(self, flipped: bool = False) -> View:
        """As it is, or mirrored left to right (if it was encoded with flips)."""
        found = [self.store.get(key) for key in self.keys[int(flipped)]]
        if found[0] is None or found[1] is None:
            raise OutputError(f"the cached features of {self.source} are gone; start again")
        return View(*found)


def encode(
    pipeline: Pipeline,
    sources: Sequence[Source],
    store: Store,
    *,
    flips: bool = False,
    progress: Progress = SILENT,
) -> list[EncodedPicture]:
    """Put features and kernel weights of every picture into ``store``, where they are not yet.

    Kernel weights are those for a map of the canvas's size, made from the features as they are
    stored, so that a run that finds them in the cache gives the same result.

    Raises:
        UsageError: the upsampler is not linear in its values; no room.
        ImageError: a picture that cannot be used; here one is not left out silently.
    """
    upsampler = pipeline.upsampler
    if upsampler is None or not upsampler.linear_in_value:
        name = "no upsampler" if upsampler is None else upsampler.name
        raise UsageError(f"probes need an upsampler that is linear in its values, not {name}")
    if pipeline.fit != "resize":
        raise UsageError("probes need pictures without padding: use --fit resize")
    views = (False, True) if flips else (False,)
    found = [
        EncodedPicture(s, tuple(_keys(pipeline, _digest(s), v) for v in views), store)
        for s in sources
    ]
    missing = [p for p in found if any(store.get(key) is None for pair in p.keys for key in pair)]
    progress.start(len(missing), f"features and {upsampler.name} kernels")
    loaded = prefetch(
        lambda picture: pipeline.load(picture.source),
        missing,
        workers=pipeline.workers,
        ahead=pipeline.workers + 1,
    )
    try:
        for number, (picture, result, error) in enumerate(loaded):
            if error is not None:
                raise error
            made = _make(pipeline, result[1], picture, views)
            if number == 0:
                store.room_for(sum(t.nbytes for t in made.values()) * len(missing))
            for key, tensor in made.items():
                store.put(key, tensor)
            progress.advance()
    finally:
        loaded.close()
    return found


def kernels_prefix(pipeline: Pipeline) -> str:
    """How the keys of this pipeline's kernel weights begin, for :meth:`Store.forget`."""
    assert pipeline.upsampler is not None
    return f"kernels-{pipeline.upsampler.name}-{_print_of(pipeline.upsampler)}-"


@torch.no_grad()
def _make(
    pipeline: Pipeline, canvas, picture: EncodedPicture, views: tuple[bool, ...]
) -> dict[str, Tensor]:
    """The tensors that ``picture`` lacks, by key."""
    backbone, upsampler = pipeline.backbone, pipeline.upsampler
    assert upsampler is not None
    image = normalise(canvas, backbone.mean, backbone.std)[None].to(pipeline.device)
    made: dict[str, Tensor] = {}
    for flipped, (features_key, weights_key) in zip(views, picture.keys, strict=True):
        shown = image.flip(-1) if flipped else image
        features = picture.store.get(features_key)
        if features is None:
            with autocast(pipeline.device, pipeline.dtype):
                features = _halved(backbone(shown)[0].float()).cpu()
            made[features_key] = features
        if picture.store.get(weights_key) is None:
            x = features.to(pipeline.device, torch.float32)[None]
            made[weights_key] = upsampler.kernels(x, shown)[0].half().contiguous().cpu()
    return made


def _halved(features: Tensor) -> Tensor:
    return features.half() if features.abs().max() < _LARGEST_HALF else features


def _digest(source: Source) -> str:
    try:
        return hashlib.sha256(source.path.read_bytes()).hexdigest()[:24]
    except OSError as error:
        raise UsageError(f"{source} cannot be read: {error.strerror or error}") from error


def _keys(pipeline: Pipeline, picture: str, flipped: bool) -> tuple[str, str]:
    """Keys of the features and of the kernel weights of one view."""
    backbone = pipeline.backbone
    size = pipeline.image_size or f"default{backbone.default_image_size}"
    shown = (picture, str(size), backbone.fingerprint, str(backbone.layer), pipeline.precision)
    view = hashlib.sha256(repr((shown, flipped)).encode()).hexdigest()[:32]
    return f"features-{view}", f"{kernels_prefix(pipeline)}{view}"


def _print_of(upsampler) -> str:
    """Its fingerprint; an upsampler without one must not share entries with another."""
    return getattr(upsampler, "fingerprint", None) or f"unnamed{id(upsampler):x}"
