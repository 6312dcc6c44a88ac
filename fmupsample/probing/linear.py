"""A linear probe on upsampled features, without ever making them.

A 1x1 convolution commutes with reassembly (kernel weights sum to 1): logits are computed at low
resolution and reassembled, which gives the logits, and the gradients, of the convolution on the
upsampled features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fmupsample.probing.cache import View
from fmupsample.probing.tasks import classes_at
from fmupsample.upsamplers.base import Upsampler


@dataclass(frozen=True)
class LinearProbe:
    """A 1x1 convolution: ``weight`` ``[outputs, C]``, ``bias`` ``[outputs]``, both float32."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """``[C, h, w]`` -> ``[outputs, h, w]``, on the device of the features."""
        weight, bias = self.weight.to(features.device), self.bias.to(features.device)
        flat = torch.addmm(bias[:, None], weight, features.flatten(1).to(weight.dtype))
        return flat.unflatten(1, features.shape[1:])

    def is_finite(self) -> bool:
        """Whether no number in it is NaN or infinite."""
        return bool(self.weight.isfinite().all() and self.bias.isfinite().all())


def stacked(probes: Sequence[LinearProbe]) -> LinearProbe:
    """One probe with the outputs of all ``probes``, one after the other."""
    return LinearProbe(torch.cat([p.weight for p in probes]), torch.cat([p.bias for p in probes]))


@torch.no_grad()
def upsampled_logits(probe: LinearProbe, upsampler: Upsampler, view: View) -> Tensor:
    """Outputs ``[outputs, H, W]`` of the picture, without its padding."""
    low = probe.logits(view.features)
    logits = upsampler.reassemble(view.weights.to(low.dtype)[None], low[None])[0]
    return logits if view.placed is None else logits[:, : view.placed[0], : view.placed[1]]


def predict(
    probes: Sequence[LinearProbe], upsampler: Upsampler, view: View, size: tuple[int, int]
) -> Tensor:
    """Classes of a picture by several probes at once, int64 ``[probes, H, W]``.

    Logits are reassembled to the map's size and brought to ``size`` bilinearly.
    """
    logits = upsampled_logits(stacked(probes), upsampler, view)
    return torch.stack([classes_at(own, size) for own in logits.chunk(len(probes))])
