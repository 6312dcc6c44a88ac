"""What the configurations of methods with aligned queries share."""

from __future__ import annotations

from dataclasses import dataclass

from fmupsample.errors import UsageError
from fmupsample.upsamplers.config import Config


@dataclass(frozen=True)
class AlignedConfig(Config):
    """Queries, keys and how they are aligned; a subclass says how they are compared.

    The switches exist for ablation: each takes one part of the method away.
    """

    guidance_channels: int = 16  # G, of the guidance map (of the stem's output, where there is one)
    kernel_size: int = 3  # K: K x K neighbours per pixel, odd
    embedding: int = 32  # channels of queries and keys
    norm_groups: int = 8  # of the GroupNorms on queries and keys
    semantic: bool = True  # use the semantic pair (keys from the features)
    detail: bool = True  # use the detail pair (keys from the guidance)
    align: bool = True  # align queries with keys: guided filter and Gaussian
    guided_radius: int = 8  # of the guided filter, in pixels
    guided_eps: float = 1e-3

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not (self.semantic or self.detail):
            raise UsageError(f"{name}: it needs the semantic pair, the detail pair, or both")
        self.require_odd("kernel_size")
        if not 0 <= self.guided_radius <= 1024 or not 0 <= self.guided_eps < float("inf"):
            raise UsageError(
                f"{name}: guided_radius={self.guided_radius} must be from 0 to 1024 and guided_eps="
                f"{self.guided_eps} at least 0"
            )
        self.require_multiple("embedding", "norm_groups")

    def require_multiple(self, name: str, divisor: str) -> None:
        """Raise a UsageError unless one field is a multiple of another."""
        value, by = getattr(self, name), getattr(self, divisor)
        if value % by:
            raise UsageError(
                f"{type(self).__name__}: {name}={value} must be a multiple of {divisor}={by}"
            )
