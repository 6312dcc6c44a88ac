"""What makes one JAFAR head differ from another."""

from __future__ import annotations

from dataclasses import dataclass

from fmupsample.errors import UsageError
from fmupsample.upsamplers.anyup.config import GROUPS
from fmupsample.upsamplers.config import Config


@dataclass(frozen=True)
class JAFARConfig(Config):
    """Shape of a JAFAR head for features of ``channels`` channels."""

    embedding: int = 128  # E: channels of queries, keys and everything before them
    heads: int = 4  # of the attention

    def __post_init__(self) -> None:
        self.require_positive("channels")
        for name in ("embedding", "heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= 4096:
                raise UsageError(f"JAFARConfig: {name} must be 1 to 4096, not {value!r}")
        # Rotary embedding pairs channels.
        for divisor in (2, GROUPS, self.heads):
            if self.embedding % divisor:
                raise UsageError(
                    f"JAFARConfig: embedding {self.embedding} is not a multiple of {divisor}"
                )
