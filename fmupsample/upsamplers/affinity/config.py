"""What makes one affinity head differ from another."""

from __future__ import annotations

from dataclasses import dataclass

from fmupsample.errors import UsageError
from fmupsample.upsamplers.config import Config


@dataclass(frozen=True)
class AffinityConfig(Config):
    """Shape of an affinity head. It never reads the features: ``channels`` is 0, any number."""

    channels: int = 0
    kernel_size: int = 5  # K: K x K cells per pixel, odd
    embedding: int = 32  # channels of queries and keys
    width: int = 32  # channels of the encoder's top-down path
    detail: int = 12  # channels of its convolutions at full resolution
    key_width: int = 64  # hidden channels of the network that makes keys of cells
    sigma_space: float = 0.75  # of the Gaussian on the distance to a cell's centre, in cells
    sigma_range: float = 0.6  # of the Gaussian on colours, in units of the normalised image

    def __post_init__(self) -> None:
        if self.channels:
            raise UsageError("an affinity head takes any number of channels: channels must be 0")
        self.require_odd("kernel_size")
        self.require_positive("sigma_space", "sigma_range")
        for name in ("embedding", "width", "detail", "key_width"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= 4096:
                raise UsageError(f"AffinityConfig: {name} must be 1 to 4096, not {value!r}")
