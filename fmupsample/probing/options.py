"""How a probe is fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fmupsample.errors import UsageError
from fmupsample.probing.metrics import IGNORE

# Found on CamVid with whitened features: see research/benchmarks/README.md.
RATES = (1e-2, 3e-2, 1e-1, 3e-1)
FEW_PICTURES = 8  # so few are fitted at one rate, for this many steps
FEW_RATE, FEW_STEPS = 3e-2, 300
# So little data says too little about each direction of the features to whiten them: two pictures
# of CamVid gave 51 mIoU without and 40 with whitening, clicks on two pictures 15 and 5.
FEW_WHITEN = 0.0


@dataclass(frozen=True)
class FitOptions:
    """How a probe is fitted."""

    rates: tuple[float, ...] = (5e-4,)  # learning rates to choose from, of AdamW
    epochs: int = 20  # passes over the training pictures
    steps: int | None = None  # instead of epochs
    batch_size: int = 4  # pictures
    pixels: int | None = 4096  # drawn per picture and step; None: all of them
    flips: bool = True  # show half of the pictures mirrored left to right
    holdout: float = 0.1  # share of the pictures by which the rate is chosen, if there are several
    weight_decay: float = 1e-2
    whiten: float = 1.0  # 1: all directions of the features have the same variance; 0: their own
    ignore: int = IGNORE  # label of pixels that are not used
    seed: int = 0  # of the start, the order, the flips, the pixels and the held-out pictures

    def __post_init__(self) -> None:
        if not self.rates or min(self.rates) <= 0:
            raise UsageError("a probe needs one learning rate or more, above 0")
        for name in ("epochs", "steps", "batch_size", "pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} {value} is not possible: it must be at least 1")
        if not 0 <= self.whiten <= 1:
            raise UsageError(f"whiten {self.whiten} is not a share from 0 to 1")
        if not 0 < self.holdout < 1:
            raise UsageError(f"holdout {self.holdout} is not a share between 0 and 1")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def options_for(
    pictures: int, *, rates: Sequence[float] | None = None, epochs: int | None = None, **more: Any
) -> FitOptions:
    """The options for so many pictures, where they are left open.

    20 epochs and the best of four learning rates; for eight pictures or fewer 300 steps at one
    rate, since too little is left to choose by, on features that are not whitened.
    """
    few = pictures <= FEW_PICTURES
    if few:
        more = {"whiten": FEW_WHITEN, "steps": FEW_STEPS if epochs is None else None, **more}
    rates = tuple(rates or ((FEW_RATE,) if few else RATES))
    return FitOptions(rates, 20 if epochs is None else epochs, **more)
