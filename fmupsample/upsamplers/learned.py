"""What learned methods share that predict their weights in one go, with a guidance or without."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.config import Config
from fmupsample.upsamplers.guidance import GuidanceStem, check_channels, guidance_map


class LearnedUpsampler(Upsampler):
    """Has a configuration, and computes its weights in float32 (float64 for float64 features).

    A subclass implements :meth:`predict`. With ``stem`` the guidance is the normalised picture
    ``[B, 3, H, W]``; without, any map ``[B, G, H, W]``, such as the encoder's in a decoder.
    """

    def __init__(self, config: Config, *, stem: bool = False) -> None:
        super().__init__()
        self.config = config
        self.stem: nn.Module | None = GuidanceStem(config.guidance_channels) if stem else None

    def check(
        self, x: Tensor, guidance: Tensor | None, size: tuple[int, int] | None
    ) -> tuple[int, int]:
        size = super().check(x, guidance, size)
        seen = guidance if self.needs_guidance else None
        expected = getattr(self.config, "guidance_channels", 0)
        stem = self.stem is not None
        check_channels(self.name, x, self.config.channels, seen, expected, stem)
        return size

    def kernels(
        self, x: Tensor, guidance: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> Tensor:
        size = self.check(x, guidance, size)
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            if self.needs_guidance:
                guidance = guidance_map(guidance.to(dtype), size, self.stem)
            return self.predict(x.to(dtype), guidance, size)

    def predict(self, x: Tensor, guidance: Tensor | None, size: tuple[int, int]) -> Tensor:
        """The weights of :meth:`kernels`; the guidance is of this size, and past the stem."""
        raise NotImplementedError
