"""A frozen vision model that returns one feature map per picture."""

from __future__ import annotations

from torch import Tensor, nn

from fmupsample.backbones.levels import Feature, extract, resolve_layer, survey
from fmupsample.errors import ShapeError
from fmupsample.fingerprint import fingerprint

# Published dense evaluations of ViTs pretrained at 224 or 256 pixels run at about this size.
DENSE_IMAGE_SIZE = 448


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

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[B, C, h, w]`` of ``images`` ``[B, 3, H, W]``, normalised with mean and std.

        Raises:
            ShapeError: not four dimensions, not three channels, or a size the model cannot take.
        """
        self._check(images)
        features = extract(self.model, images, self._feature)
        expected = (images.shape[0], self.channels, *self.grid(images.shape[-2:]))
        if tuple(features.shape) != expected:
            raise ShapeError(
                f"{self.name} returned features {list(features.shape)} for pictures "
                f"{list(images.shape)}; {list(expected)} was expected"
            )
        return features

    def train(self, mode: bool = True) -> Backbone:
        """Stays in eval mode whatever is asked: dropout and batch statistics are part of training,
        and this model is frozen."""
        return super().train(False)

    def extra_repr(self) -> str:
        return (
            f"{self.name}, layer={self.layer}, channels={self.channels}, stride={self.stride}, "
            f"fixed_size={self.fixed_size}"
        )

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ShapeError(
                f"{self.name} takes normalised pictures as a floating [B, 3, H, W] tensor, "
                f"got {images.dtype} {list(images.shape)}"
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
