"""What can be exported: four functions of tensors, with inputs to record and to check them by."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.backbones import Backbone
from fmupsample.errors import UsageError
from fmupsample.exporting.plain import PlainMode
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.registry import METHODS

PARTS = ("backbone", "kernels", "reassemble", "fused")


@dataclass(frozen=True)
class Part:
    """One function, as it is recorded and as it should be.

    Attributes:
        name: one of :data:`PARTS`.
        module: what is recorded; takes the tensors of ``inputs`` by position.
        inputs: ``(batch, (H, W)) -> {name: tensor}``, the same ones every time.
        output: the name of its result.
        expected: the same function in the library's own operators.
        size: ``(H, W)`` in pixels that it is exported for.
        stride: pixels per cell, (y, x).
        upsampler: the method's name, for messages; empty for the backbone.
    """

    name: str
    module: nn.Module
    inputs: Callable[[int, tuple[int, int]], dict[str, Tensor]]
    output: str
    expected: Callable[..., Tensor]
    size: tuple[int, int]
    stride: tuple[int, int]
    upsampler: str = ""


def exportable_methods() -> list[str]:
    """The methods whose every step has a plain form, each of them tried in the tests."""
    return [name for name, row in METHODS.items() if row.exportable]


def make_part(
    name: str,
    backbone: Backbone,
    upsampler: Upsampler,
    size: tuple[int, int],
    channels: int | None = None,
) -> Part:
    """The part ``name`` of a backbone and its upsampler.

    ================  ==========================================================================
    ``backbone``      image ``[B, 3, H, W]``, normalised -> features ``[B, C, h, w]``
    ``kernels``       image, features -> weights ``[B, N, H, W]``
    ``reassemble``    weights, values ``[B, V, h, w]`` -> upsampled ``[B, V, H, W]``
    ``fused``         image -> upsampled ``[B, C, H, W]``
    ================  ==========================================================================

    Args:
        size: ``(H, W)`` in pixels.
        channels: V, of ``reassemble``; by default C.

    Raises:
        UsageError: no such part, or one that this method does not have.
        ShapeError: a size that the backbone cannot take.
    """
    _check_name(name, upsampler)
    fixed = _with_positions(backbone, size)
    module, expected, output = {
        "backbone": (fixed, backbone, "features"),
        "kernels": (_Kernels(upsampler), _Kernels(upsampler), "weights"),
        "reassemble": (_Reassemble(upsampler), _Reassemble(upsampler), "upsampled"),
        "fused": (_Fused(fixed, upsampler), _Fused(backbone, upsampler), "upsampled"),
    }[name]
    if name in ("backbone", "fused"):
        backbone._check(torch.empty(1, 3, *size, device="meta"))
    return Part(
        name,
        _Plain(module).eval(),
        partial(_inputs, name, backbone, upsampler, channels or backbone.channels),
        output,
        torch.no_grad()(expected),
        size,
        (int(backbone.stride[0]), int(backbone.stride[1])),
        "" if name == "backbone" else upsampler.name,
    )


def _check_name(name: str, upsampler: Upsampler) -> None:
    if name not in PARTS:
        raise UsageError(f"{name!r} is no part to export: {', '.join(PARTS)}")
    if name != "backbone" and upsampler.name not in exportable_methods():
        raise UsageError(
            f"{upsampler.name} cannot be exported; {', '.join(exportable_methods())} can, and the "
            "backbone alone"
        )
    if name in ("kernels", "reassemble") and not upsampler.linear_in_value:
        raise UsageError(
            f"{upsampler.name} is not linear in its values, so it has no kernels to export apart; "
            "export backbone or fused"
        )


@torch.no_grad()
def _inputs(
    name: str,
    backbone: Backbone,
    upsampler: Upsampler,
    values: int,
    batch: int,
    pixels: tuple[int, int],
) -> dict[str, Tensor]:
    """What the part takes, of a size in pixels; ``values``: channels of those to reassemble."""
    image = _drawn(3, pixels, batch)
    if name in ("backbone", "fused"):
        return {"image": image}
    features = _drawn(backbone.channels, backbone.grid(pixels), batch)
    if name == "kernels":
        return {"image": image, "features": features}
    weights = _kernels(upsampler, image, features)
    return {"weights": weights, "values": _drawn(values, backbone.grid(pixels), batch)}


class _Plain(nn.Module):
    """A module whose calls are replaced by plain ones while it is recorded."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        with PlainMode():
            return self.module(*inputs)


class _Kernels(nn.Module):
    def __init__(self, upsampler: Upsampler) -> None:
        super().__init__()
        self.upsampler = upsampler

    def forward(self, image: Tensor, features: Tensor) -> Tensor:
        return _kernels(self.upsampler, image, features)


class _Reassemble(nn.Module):
    def __init__(self, upsampler: Upsampler) -> None:
        super().__init__()
        self.upsampler = upsampler

    def forward(self, weights: Tensor, values: Tensor) -> Tensor:
        return self.upsampler.reassemble(weights, values)


class _Fused(nn.Module):
    def __init__(self, backbone: nn.Module, upsampler: Upsampler) -> None:
        super().__init__()
        self.backbone, self.upsampler = backbone, upsampler

    def forward(self, image: Tensor) -> Tensor:
        guidance = image if self.upsampler.needs_guidance else None
        return self.upsampler(self.backbone(image), guidance, size=tuple(image.shape[2:]))


def _kernels(upsampler: Upsampler, image: Tensor, features: Tensor) -> Tensor:
    guidance = image if upsampler.needs_guidance else None
    weights = upsampler.kernels(features, guidance, tuple(image.shape[2:]))
    return weights.contiguous()  # of the training-free ones, a view of one number


def _with_positions(backbone: Backbone, size: tuple[int, int]) -> Backbone:
    """The backbone with its positional embeddings resized for ``size``, once and for all."""
    model = backbone.model
    if getattr(model, "pos_embed", None) is None or not hasattr(model, "set_input_size"):
        return backbone
    copy = deepcopy(backbone)
    copy.model.set_input_size(size)
    return copy


def _drawn(channels: int, size: tuple[int, int], batch: int) -> Tensor:
    """Smooth random maps ``[B, channels, H, W]`` with some noise, as images and features are."""
    generator = torch.Generator().manual_seed(channels + batch)
    coarse = torch.randn(batch, channels, *(max(1, n // 8) for n in size), generator=generator)
    noise = torch.randn(batch, channels, *size, generator=generator)
    return F.interpolate(coarse, size, mode="bilinear", align_corners=False) + 0.1 * noise
