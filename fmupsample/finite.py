"""NaN and infinity are never written: each result is looked at before it becomes a file."""

from __future__ import annotations

from torch import Tensor

from fmupsample.errors import FmupsampleError


def is_finite(x: Tensor) -> bool:
    """Whether all of ``x`` are numbers, in one pass and without a copy (integers always are)."""
    if not x.is_floating_point() or not x.numel():
        return True
    low, high = x.aminmax()  # NaN, if there is one
    return float(low) > float("-inf") and float(high) < float("inf")


def check_finite(x: Tensor, source: object, what: str) -> Tensor:
    """``x``, if it is finite.

    Args:
        source: the picture; what: of it, such as "the upsampled map".

    Raises:
        FmupsampleError: NaN or infinity.
    """
    if not is_finite(x):
        raise FmupsampleError(
            f"{source}: {what} holds NaN or infinity, so nothing was written; another upsampler, "
            "head or --precision fp32 may help"
        )
    return x
