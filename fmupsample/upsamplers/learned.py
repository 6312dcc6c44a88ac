"""What training gives a new ReSFU unless asked otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Improvements on the paper's own form, measured in benchmarks/README.md.
_WHOLE_CELLS = {
    "neighbours": "coarse", "similarity": "distance", "taper": True, "sigma_range": 0.6,
}  # fmt: skip
RECOMMENDED: dict[str, dict[str, Any]] = {"resfu": _WHOLE_CELLS, "resfu-universal": _WHOLE_CELLS}

# Of these, what a head is given after its training only: trained with the colours of its prior, it
# learns to argue with them.
LATE: dict[str, tuple[str, ...]] = dict.fromkeys(RECOMMENDED, ("sigma_range",))


def recommended(name: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration to train ``name`` with, given the fields that were asked for."""
    fields = RECOMMENDED.get(name, {})
    # "stem" is the form inside decoders, which sees no picture.
    apart = fields.keys() & asked.keys() or not asked.get("stem", True)
    return dict(asked) if apart else {**fields, **asked}
