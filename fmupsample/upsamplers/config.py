"""What the configurations of the learned upsamplers share."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from fmupsample.errors import UsageError

# What a file may hold for a field, by how the field is annotated.
_KINDS: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "str": (str,),
    "float": (int, float),
    "float | None": (int, float, type(None)),
}


def _check_kind(owner: str, name: str, annotation: str, value: Any) -> None:
    kinds = _KINDS.get(annotation, (type(value),))
    if type(value) not in kinds or (type(value) is float and not math.isfinite(value)):
        raise UsageError(f"{owner}: {name} is of type {annotation}, not {str(value)[:40]!r}")


@dataclass(frozen=True)
class Config:
    """Turns into a mapping and back; a subclass adds its fields and checks them."""

    channels: int  # C, of the features

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from a stored mapping; unknown keys are refused by name."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UsageError(
                f"{cls.__name__} has no option {', '.join(unknown)}; it has {sorted(known)}"
            )
        for field in fields(cls):
            if field.name in values:
                _check_kind(cls.__name__, field.name, str(field.type), values[field.name])
        return cls(**values)

    def require_odd(self, name: str) -> None:
        """Raise a UsageError unless the field is an odd positive number."""
        value = getattr(self, name)
        if not isinstance(value, int) or value < 1 or value % 2 == 0:
            raise UsageError(f"{type(self).__name__}: {name} must be odd and positive, not {value}")

    def require_one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        """Raise a UsageError unless the field is one of these words."""
        value = getattr(self, name)
        if value not in allowed:
            raise UsageError(
                f"{type(self).__name__}: {name} is one of {', '.join(allowed)}, not {value!r}"
            )

    def require_positive(self, *names: str) -> None:
        """Raise a UsageError unless each field is a number above 0."""
        for name in names:
            value = getattr(self, name)
            if not value > 0:
                raise UsageError(
                    f"{type(self).__name__}: {name} must be more than 0, not {value!r}"
                )

    def require_counts(self, *names: str) -> None:
        """Raise a UsageError unless each field is a whole number from 1 to 4096."""
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= 4096:
                raise UsageError(f"{type(self).__name__}: {name} must be 1 to 4096, not {value!r}")

    def require_multiple(self, name: str, *divisors: int) -> None:
        """Raise a UsageError unless the field is a multiple of each."""
        value = getattr(self, name)
        for divisor in divisors:
            if value % divisor:
                raise UsageError(
                    f"{type(self).__name__}: {name} {value} is not a multiple of {divisor}"
                )
