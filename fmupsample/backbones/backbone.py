"""A frozen vision model that returns one feature map per picture."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fmupsample.backbones.levels import (
    Feature,
    extract,
    extract_with_global,
    resolve_layer,
    survey,
)
from fmupsample.backbones.transform import Transform
from fmupsample.errors import ShapeError, UsageError
from fmupsample.fingerprint import fingerprint

# Published dense evaluations of ViTs pretrained at 224 or 256 pixels run at about this size.
DENSE_IMAGE_SIZE = 448
# Numbers this many times as far from 0 as normalised black or white are no normalised image.
_OUT_OF_RANGE = 10


class Backbone(nn.Module):
    """``[B, 3, H, W]`` normalised pictures -> ``[B, C, h, w]`` features; frozen, always in eval.

    Made by :func:`fmupsample.load_backbone`. Everything about the sizes is found out by asking
    the model and by two or three tiny forward passes, never from its name.

    Attributes:
        name: canonical full tag: ``vit_small_patch14_dinov2.lvd142m``, ``embedded.v1``,
            ``<architecture>.local-<fingerprint>`` for a local checkpoint,
            ``<architecture>.random`` without weights.
        architecture: timm's name of the architecture.
        channels: C.
        stride: image pixels per feature cell, (y, x); whole, unless there are several views.
        views: in how many shifted views every image is seen, see :mod:`.views`.
        size_multiple: the sides of a picture must be multiples of this, (y, x).
        fixed_size: the only (H, W) the model accepts, or ``None``.
        default_image_size: sensible length of the short side, pixels.
        mean, std: normalisation of RGB in 0..1.
        layer: index of the block (ViT) or level (hierarchical net) the features come from.
        prefix_tokens: class and register tokens, which are not part of the map.
        fingerprint: first 12 hex digits of a SHA-256 over all weights.
        card: what is known about the weights (for the embedded model), else ``{}``.
    """

    views = 1
    _looked = False  # whether images were found to be in the range of normalised ones

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        architecture: str,
        layer: int | str | None = None,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        native_size: tuple[int, int],
        default_image_size: int | None = None,
        card: dict | None = None,
    ) -> None:
        """Wrap ``model``, a timm model without classifier.

        Args:
            native_size: (H, W) the model was built or pretrained for.
            default_image_size: overrides the choice made from ``native_size``.

        Raises:
            BackboneError: no such layer, or the model gives no regular grid of features.
        """
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.architecture = architecture
        self.mean = tuple(float(v) for v in mean)
        self.std = tuple(float(v) for v in std)
        self.card = card or {}
        self.layer: int | str = resolve_layer(model, layer, architecture)
        found = survey(model, self.layer, native_size, architecture)
        self._feature: Feature = found.feature
        self.channels = found.channels
        self.stride = found.stride
        self.size_multiple = found.size_multiple
        self.fixed_size = found.fixed_size
        self.prefix_tokens = int(getattr(model, "num_prefix_tokens", 0) or 0)
        self.default_image_size = default_image_size or self._sensible_size(native_size)
        self.fingerprint = fingerprint(model.state_dict())

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """``(h, w)`` of the features of a picture of ``size`` ``(H, W)`` pixels."""
        return size[0] // self.stride[0], size[1] // self.stride[1]

    @property
    def transform(self) -> Transform:
        """From one image of any kind to a normalised ``[3, H, W]``; for a ``DataLoader``."""
        return Transform(
            self.mean, self.std, self.size_multiple, self.fixed_size, self.default_image_size
        )

    def prepare(
        self, images: Any, *, image_size: int | str | tuple[int, int] | None = None
    ) -> Tensor:
        """Read, resize and normalise images -> ``[B, 3, H, W]``, on the device of the backbone.

        Args:
            images: one, or a list of them: paths, Pillow images, uint8 arrays ``[H, W, 3]``,
                tensors ``[3, H, W]``; also batches, ``[B, H, W, 3]`` and ``[B, 3, H, W]``.
                Floating numbers are RGB from 0 to 1.
            image_size: the short side in pixels, ``(H, W)``, ``"448x672"`` or ``"native"``;
                default: what suits the backbone, as the short side.

        Raises:
            ImageError: a file that cannot be read.
            ShapeError: images whose sizes differ, or that are none.
            UsageError: numbers in another range; a size that the backbone does not take.
        """
        several = isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4
        ready = list(map(self.transform.to_size(image_size), images if several else [images]))
        sizes = sorted({(i.shape[1], i.shape[2]) for i in ready})
        if len(sizes) != 1:
            shown = ", ".join(f"{height}x{width}" for height, width in sizes[:5]) or "none"
            raise ShapeError(
                f"a batch needs images of one size, and there are {shown}: give "
                "image_size=(H, W), or one image at a time"
            )
        weight = self._weight()
        return torch.stack(ready).to(weight.device, weight.dtype)

    @cached_property
    def global_channels(self) -> int:
        """D, the length of the vectors of whole images.

        Raises:
            BackboneError: the model has none.
        """
        weight = self._weight()
        # Two cells of the last level, which may lie deeper than the level of the features.
        size = self.fixed_size or tuple(-(-64 // n) * n for n in self.size_multiple)
        with torch.no_grad():
            return self(weight.new_zeros(1, 3, *size), return_global=True)[1].shape[1]

    def forward(
        self, images: Any, *, return_global: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Features ``[B, C, h, w]`` of ``images`` ``[B, 3, H, W]``, normalised with mean and std.

        What is no tensor goes through :meth:`prepare` first.

        Args:
            return_global: give ``(features, vectors)``, with a vector ``[B, D]`` of each whole
                image: what timm's model without its classifier returns (the class token, or what
                the model pools), of its last layer. In the same pass, to the last layer.

        Raises:
            BackboneError: ``return_global`` of a model that has no such vector.
            ShapeError: not four dimensions, not three channels, or a size the model cannot take.
            UsageError: another dtype or device than the backbone's, or pixels from 0 to 255.
        """
        images = self._taken(images)
        self._check_numbers(images)
        vectors = None
        if return_global:
            features, vectors = extract_with_global(self.model, images, self._feature)
        else:
            features = extract(self.model, images, self._feature)
        expected = (images.shape[0], self.channels, *self.grid(images.shape[-2:]))
        if tuple(features.shape) != expected:
            raise ShapeError(
                f"{self.name} returned features {list(features.shape)} for pictures "
                f"{list(images.shape)}; {list(expected)} was expected"
            )
        return features if vectors is None else (features, vectors)

    def train(self, mode: bool = True) -> Backbone:
        """Stays in eval mode whatever is asked: dropout and batch statistics are part of training,
        and this model is frozen."""
        return super().train(False)

    def extra_repr(self) -> str:
        return (
            f"{self.name}, layer={self.layer}, channels={self.channels}, stride={self.stride}, "
            f"fixed_size={self.fixed_size}"
        )

    def _taken(self, images: Any) -> Tensor:
        """Give the images as a tensor of a shape that the model takes."""
        if not isinstance(images, Tensor):
            return self.prepare(images)
        self._check(images)
        return images

    def _weight(self) -> Tensor:
        return next(self.model.parameters())

    def _check_numbers(self, images: Tensor) -> None:
        weight = self._weight()
        if images.device != weight.device:
            raise UsageError(
                f"the images are on {images.device} and the backbone is on {weight.device}: use "
                f"images.to({str(weight.device)!r})"
            )
        if images.dtype != weight.dtype and not torch.is_autocast_enabled(images.device.type):
            kind = str(weight.dtype).removeprefix("torch.")
            raise UsageError(
                f"the images are {str(images.dtype).removeprefix('torch.')} and the backbone is "
                f"{kind}: use images.to(torch.{kind}), or torch.autocast"
            )
        # A GPU would have to be waited for: there only the first images are looked at.
        looked = self._looked and images.device.type != "cpu"
        if looked or images.is_meta or torch.compiler.is_compiling() or not images.numel():
            return
        most = max(max(m, 1 - m) / s for m, s in zip(self.mean, self.std, strict=True))
        if (high := float(images.detach().amax())) > _OUT_OF_RANGE * most:
            raise UsageError(
                f"normalised images reach at most {most:.3g}, and these {high:.4g}: are they "
                "pixels from 0 to 255? backbone.prepare(images) normalises uint8 pixels"
            )
        self._looked = True

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ShapeError(
                f"{self.name} takes normalised pictures as a floating [B, 3, H, W] tensor, "
                f"got {images.dtype} {list(images.shape)}; backbone.prepare(images) makes one"
            )
        height, width = images.shape[-2:]
        if self.fixed_size is not None and (height, width) != self.fixed_size:
            raise ShapeError(
                f"{self.name} accepts only {self.fixed_size[0]}x{self.fixed_size[1]} pixels, "
                f"got {height}x{width}; load it with image_size=({height}, {width}), or resize"
            )
        multiple = self.size_multiple
        if height % multiple[0] or width % multiple[1] or not height or not width:
            raise ShapeError(
                f"{self.name} needs picture sides that are multiples of "
                f"{multiple[0]}x{multiple[1]} pixels, got {height}x{width}"
            )

    def _sensible_size(self, native: tuple[int, int]) -> int:
        if self.fixed_size is not None:
            return min(self.fixed_size)
        multiple = self.size_multiple[0]
        return round(max(min(native), DENSE_IMAGE_SIZE) / multiple) * multiple
