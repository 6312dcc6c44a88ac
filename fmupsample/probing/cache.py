"""Frozen features and kernel weights, made once per picture and read in every epoch.

    store = MemoryStore()                       # or DiskStore("cache/")
    pictures = encode(pipeline, find_images(["photos"]), store, flips=True)
    seen = pictures[0].view(flipped=True)       # .features [C, h, w], .weights [N, H, W]

An entry is known by the picture's content, the size at which it is shown, whether it is flipped,
the backbone, and for kernel weights the upsampler. All of it is kept in half precision.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
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
from fmupsample.images.read import read_size
from fmupsample.images.size import Frame
from fmupsample.pipeline import Pipeline
from fmupsample.prefetch import prefetch
from fmupsample.progress import SILENT, Progress
from fmupsample.threads import compute_alone
from fmupsample.upsamplers.base import Upsampler

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
                f"features and kernel weights need {(self.used + size) / 1e9:.3g} GB of memory, "
                f"more than the limit of {self.limit / 1e9:.3g} GB: keep them on disk (give a "
                "cache folder), show the pictures smaller, or take fewer"
            )

    def forget(self, prefix: str) -> None:
        for key in [key for key in self._kept if key.startswith(prefix)]:
            self.used -= self._kept.pop(key).nbytes


class DiskStore:
    """Keeps each tensor in a safetensors file of a folder, mapped into memory when read.

    A file is there whole or not at all. The folder may be shared by runs, and deleted at any time
    between them; it grows with every picture, size, backbone and upsampler, up to ``limit`` bytes:
    then what has not been used for longest goes, and what this object has read or written stays.
    """

    def __init__(self, folder: str | Path, limit: int | None = None) -> None:
        self.folder, self.limit = Path(folder), limit
        self._ours: set[str] = set()

    def get(self, key: str) -> Tensor | None:
        path = self._path(key)
        try:
            tensor = load_file(path)["tensor"]
        except (OSError, SafetensorError, KeyError):
            return None  # missing, or damaged: it is made again
        if key not in self._ours:
            self._ours.add(key)
            with contextlib.suppress(OSError):
                os.utime(path)
        return tensor

    def put(self, key: str, tensor: Tensor) -> None:
        path = self._path(key)
        self._ours.add(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_bytes(save({"tensor": tensor.contiguous()}))
        except OSError as error:
            raise OutputError(f"the cache {self.folder} cannot be written: {error}") from error

    def room_for(self, size: int) -> None:
        """Make room for ``size`` more bytes among what other runs left."""
        if self.limit is not None:
            kept, others = 0, []
            for path in self.folder.glob("*.safetensors"):
                with contextlib.suppress(OSError):
                    stat = path.stat()
                    if path.stem in self._ours:
                        kept += stat.st_size
                    else:
                        others.append((stat.st_mtime, stat.st_size, path))
            if kept + size > self.limit:
                raise UsageError(
                    f"features and kernel weights need {(kept + size) / 1e9:.3g} GB on disk, more "
                    f"than the limit of {self.limit / 1e9:.3g} GB: raise --cache-limit, show the "
                    "pictures smaller, or take fewer"
                )
            there = sum(entry[1] for entry in others)
            for _, own, path in sorted(others):
                if kept + there + size <= self.limit:
                    break
                path.unlink(missing_ok=True)
                there -= own
        existing = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(existing).free
        if size > free:
            raise OutputError(
                f"features and kernel weights need {size / 1e9:.3g} GB, but {self.folder} has "
                f"{free / 1e9:.3g} GB free: show the pictures smaller, or take fewer"
            )

    def forget(self, prefix: str) -> None:
        for path in self.folder.glob(f"{escape(prefix)}*.safetensors"):
            path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


class SpillingStore:
    """In memory what fits there, the rest on disk.

    A set of pictures goes to one of the two as a whole, by :meth:`room_for`.
    """

    def __init__(self, memory: MemoryStore, disk: DiskStore) -> None:
        self.memory, self.disk = memory, disk
        self._to_disk = False

    def get(self, key: str) -> Tensor | None:
        found = self.memory.get(key)
        return self.disk.get(key) if found is None else found

    def put(self, key: str, tensor: Tensor) -> None:
        (self.disk if self._to_disk else self.memory).put(key, tensor)

    def room_for(self, size: int) -> None:
        try:
            self.memory.room_for(size)
            self._to_disk = False
        except UsageError:
            self.disk.room_for(size)
            self._to_disk = True

    def forget(self, prefix: str) -> None:
        self.memory.forget(prefix)
        self.disk.forget(prefix)


@dataclass(frozen=True)
class View:
    """What a probe sees of a picture.

    Attributes:
        features: ``[C, h, w]``, float16 (float32 if they exceed its range).
        weights: ``[N, H, W]``, float16.
        placed: ``(H, W)`` that the picture takes at the top left, where the rest is padding.
    """

    features: Tensor
    weights: Tensor
    placed: tuple[int, int] | None = None

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
    frame: Frame | None = None  # ``None``: without padding

    def view(self, flipped: bool = False) -> View:
        """As it is, or mirrored left to right (if it was encoded with flips)."""
        found = [self.store.get(key) for key in self.keys[int(flipped)]]
        if found[0] is None or found[1] is None:
            raise OutputError(f"the cached features of {self.source} are gone; start again")
        placed = self.frame.placed if self.frame and self.frame.padded else None
        return View(*found, placed)


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
    views = (False, True) if flips else (False,)
    found = [
        EncodedPicture(
            s,
            tuple(_keys(pipeline, _digest(s), v) for v in views),
            store,
            pipeline.frame(read_size(s.path)),
        )
        for s in sources
    ]
    missing = [p for p in found if any(store.get(key) is None for pair in p.keys for key in pair)]
    progress.start(len(missing), f"features and {upsampler.name} kernels")
    loaded = prefetch(
        lambda picture: pipeline.load(picture.source),
        missing,
        workers=pipeline.workers,
        ahead=pipeline.workers + 1,
        begin=compute_alone,
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
    image = pipeline.guidance(canvas)[None]
    placed = picture.frame.placed if picture.frame else canvas.shape[:2]
    made: dict[str, Tensor] = {}
    for flipped, (features_key, weights_key) in zip(views, picture.keys, strict=True):
        shown = _flipped(image, placed) if flipped else image
        features = picture.store.get(features_key)
        if features is None:
            with autocast(pipeline.device, pipeline.dtype):
                features = _halved(backbone(shown)[0].float()).cpu()
            made[features_key] = features
        if picture.store.get(weights_key) is None:
            x = features.to(pipeline.device, torch.float32)[None]
            made[weights_key] = upsampler.kernels(x, shown)[0].half().contiguous().cpu()
    return made


def _flipped(image: Tensor, placed: tuple[int, int]) -> Tensor:
    """The picture mirrored in its place; the padding repeats the new last column."""
    width = placed[1]
    picture = image[..., :width].flip(-1)
    rest = image.shape[-1] - width
    return torch.cat([picture, picture[..., -1:].expand(*picture.shape[:-1], rest)], -1)


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
    if pipeline.fit != "resize":
        shown += (pipeline.fit,)
    view = hashlib.sha256(repr((shown, flipped)).encode()).hexdigest()[:32]
    return f"features-{view}", f"{kernels_prefix(pipeline)}{view}"


def _print_of(upsampler: Upsampler) -> str:
    """Its fingerprint; an upsampler without one must not share entries with another."""
    return upsampler.fingerprint or f"unnamed{id(upsampler):x}"
