"""What makes one AnyUp head differ from another."""

from __future__ import annotations

from dataclasses import dataclass

from fmupsample.errors import UsageError
from fmupsample.upsamplers.config import Config
from fmupsample.upsamplers.encoders.networks import GROUPS


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
        self.require_counts("embedding", "heads")
        # Rotary embedding pairs channels.
        self.require_multiple("embedding", 2, GROUPS, self.heads)
        if not 0 < self.window_ratio <= 1:
            raise UsageError(
                f"AnyUpConfig: window_ratio must be in (0, 1], not {self.window_ratio!r}"
            )
