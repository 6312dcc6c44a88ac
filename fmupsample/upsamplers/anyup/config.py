"""What makes one AnyUp head differ from another."""

from __future__ import annotations

from dataclasses import dataclass

from fmupsample.errors import UsageError
from fmupsample.upsamplers.config import Config

GROUPS = 8  # of every group normalisation


@dataclass(frozen=True)
class AnyUpConfig(Config):
    """Shape of an AnyUp head. It takes features of any kind: ``channels`` is 0, any number."""

    channels: int = 0
    embedding: int = 128  # E: channels of queries, keys and everything before them
    heads: int = 4  # of the attention
    feature_kernel: int = 5  # side of the filters that every channel of the features is given to
    window_ratio: float = 0.1  # a pixel attends to cells nearer than this share of the map

    def __post_init__(self) -> None:
        if self.channels:
            raise UsageError("an AnyUp head takes any number of channels: channels must be 0")
        self.require_odd("feature_kernel")
        for name in ("embedding", "heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= 4096:
                raise UsageError(f"AnyUpConfig: {name} must be 1 to 4096, not {value!r}")
        # Rotary embedding pairs channels.
        for divisor in (2, GROUPS, self.heads):
            if self.embedding % divisor:
                raise UsageError(
                    f"AnyUpConfig: embedding {self.embedding} is not a multiple of {divisor}"
                )
        if not 0 < self.window_ratio <= 1:
            raise UsageError(
                f"AnyUpConfig: window_ratio must be in (0, 1], not {self.window_ratio!r}"
            )
