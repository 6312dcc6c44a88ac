"""What makes one head of bilateral cells differ from another."""

from __future__ import annotations

from dataclasses import dataclass

from fmupsample.errors import UsageError
from fmupsample.upsamplers.aligned.config import AlignedConfig


@dataclass(frozen=True)
class BilateralCellsConfig(AlignedConfig):
    """For the features of any backbone (``channels=0``), or of one."""

    channels: int = 0
    # What makes keys of the features. "projected": a random orthogonal projection of standardised
    # features, which prefers no channel; for any number of channels a new one at every step of
    # training and one of a fixed seed in use, for a given number where training starts. "learned":
    # a 1x1 convolution, for a given number. None: "learned" where that is possible.
    keys: str | None = None
    # The prior. Sigmas of Gaussians on the distance of a pixel from a cell's centre, in cells, and
    # on how its colour differs from the cell's mean, in units of the picture. Taper: cells count
    # less with their distance, down to nothing where they leave the K x K, so there are no seams.
    taper: bool = True
    sigma_space: float | None = None
    sigma_range: float | None = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keys is None:
            object.__setattr__(self, "keys", "learned" if self.channels else "projected")
        self.require_one_of("keys", ("learned", "projected"))
        if self.channels < 0 or (self.channels == 0 and self.keys != "projected"):
            raise UsageError(
                "BilateralCellsConfig: channels=0, any number, is for keys='projected'"
            )
        for name in ("sigma_space", "sigma_range"):
            if getattr(self, name) is not None:
                self.require_positive(name)
