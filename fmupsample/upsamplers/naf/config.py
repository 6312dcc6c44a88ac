"""What makes one NAF head differ from another."""

from __future__ import annotations

from dataclasses import dataclass

from fmupsample.errors import UsageError
from fmupsample.upsamplers.config import Config
from fmupsample.upsamplers.encoders.networks import GROUPS


@dataclass(frozen=True)
class NAFConfig(Config):
    """Shape of a NAF head. It takes features of any kind: ``channels`` is 0, any number."""

    channels: int = 0
    embedding: int = 256  # E: channels of queries and keys, half of them from either encoder
    heads: int = 4  # of the attention; each weighs its share of the features' channels
    rotary_heads: int = 4  # parts of the embedding that are turned alike
    kernel_size: int = 9  # side of the neighbourhood, in cells
    blocks: int = 2  # of each encoder

    def __post_init__(self) -> None:
        if self.channels:
            raise UsageError("a NAF head takes any number of channels: channels must be 0")
        self.require_odd("kernel_size")
        self.require_counts("embedding", "heads", "rotary_heads", "blocks", "kernel_size")
        # Rotary embedding pairs channels, half of them for the rows.
        self.require_multiple("embedding", 2 * GROUPS, self.heads, 4 * self.rotary_heads)
