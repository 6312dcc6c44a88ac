"""Images normalised for one backbone, brought to what a head for any backbone was trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# ImageNet's, of RGB in 0..1: how heads for any backbone want images normalised.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Renormalisation:
    """From one mean and standard deviation to :data:`MEAN` and :data:`STD`; at first no change."""

    def __init__(self) -> None:
        self.gain: Tensor | None = None
        self.shift: Tensor | None = None

    def set(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Images are normalised by ``mean`` and ``std``, of RGB in 0..1."""
        own_mean, own_std, mean, std = (
            torch.tensor(values, dtype=torch.float64)[:, None, None]
            for values in (MEAN, STD, mean, std)
        )
        self.gain, self.shift = std / own_std, (mean - own_mean) / own_std

    def __call__(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        """``image`` ``[..., 3, H, W]``, renormalised, in ``dtype``."""
        image = image.to(dtype)
        if self.gain is None:
            return image
        return torch.addcmul(self.shift.to(image), image, self.gain.to(image))
