"""What makes one JAFAR head differ from another."""

from __future__ import annotations

from dataclasses import dataclass

from fmupsample.upsamplers.config import Config
from fmupsample.upsamplers.encoders.networks import GROUPS


@dataclass(frozen=True)
class JAFARConfig(Config):
    """Shape of a JAFAR head for features of ``channels`` channels."""

    embedding: int = 128  # E: channels of queries, keys and everything before them
    heads: int = 4  # of the attention

    def __post_init__(self) -> None:
        self.require_positive("channels")
        self.require_counts("embedding", "heads")
        # Rotary embedding pairs channels.
        self.require_multiple("embedding", 2, GROUPS, self.heads)
