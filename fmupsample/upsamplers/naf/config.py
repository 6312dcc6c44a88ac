"""What makes one NAF head differ from another."""

from __future__ import annotations

from dataclasses import dataclass

from fmupsample.errors import UsageError
from fmupsample.upsamplers.anyup.config import GROUPS
from fmupsample.upsamplers.config import Config


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
        for name in ("embedding", "heads", "rotary_heads", "blocks", "kernel_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= 4096:
                raise UsageError(f"NAFConfig: {name} must be 1 to 4096, not {value!r}")
        # Rotary embedding pairs channels, half of them for the rows.
        for divisor in (2 * GROUPS, self.heads, 4 * self.rotary_heads):
            if self.embedding % divisor:
                raise UsageError(
                    f"NAFConfig: embedding {self.embedding} is not a multiple of {divisor}"
                )
