"""Frozen features and kernel weights, made once per picture and read in every epoch.

    store = Store()                             # or Store(memory=0, folder="cache/")
    pictures = encode(pipeline, find_images(["photos"]), store, flips=True)
    seen = pictures[0].view(flipped=True)       # .features [C, h, w], .weights [N, H, W]

An entry is known by the picture's content, the size at which it is shown, whether it is flipped,
the backbone, and for kernel weights the upsampler. All of it is kept in half precision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fmupsample.device import autocast
from fmupsample.errors import OutputError, UsageError
from fmupsample.images.find import Source
from fmupsample.images.read import read_size
from fmupsample.images.size import Frame
from fmupsample.pipeline import Pipeline
from fmupsample.prefetch import prefetch
from fmupsample.probing.store import Store
from fmupsample.progress import SILENT, Progress
from fmupsample.threads import compute_alone

_LARGEST_HALF = torch.finfo(torch.float16).max


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
        EncodedPicture(s, _keys(pipeline, s, views), store, pipeline.frame(read_size(s.path)))
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
    method = pipeline.upsampler
    assert method is not None
    # An upsampler without a fingerprint must not share entries with another.
    return f"kernels-{method.name}-{method.fingerprint or f'unnamed{id(method):x}'}-"


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
                features = halved(backbone(shown)[0].float()).cpu()
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


def halved(features: Tensor) -> Tensor:
    """In float16, if that holds them."""
    return features.half() if features.abs().max() < _LARGEST_HALF else features


def _keys(
    pipeline: Pipeline, source: Source, views: tuple[bool, ...]
) -> tuple[tuple[str, str], ...]:
    """Keys of the features and of the kernel weights of each view."""
    try:
        picture = hashlib.sha256(source.path.read_bytes()).hexdigest()[:24]
    except OSError as error:
        raise UsageError(f"{source} cannot be read: {error.strerror or error}") from error
    backbone = pipeline.backbone
    size = pipeline.image_size or f"default{backbone.default_image_size}"
    shown = (picture, str(size), backbone.fingerprint, str(backbone.layer), pipeline.precision)
    if pipeline.fit != "resize":
        shown += (pipeline.fit,)
    prefix = kernels_prefix(pipeline)
    names = [hashlib.sha256(repr((shown, v)).encode()).hexdigest()[:32] for v in views]
    return tuple((f"features-{name}", f"{prefix}{name}") for name in names)
