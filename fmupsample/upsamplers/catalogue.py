"""Every upsampler there is, in one table: what it needs, what it can do, what it costs."""

from __future__ import annotations

from dataclasses import dataclass

from fmupsample.upsamplers.complexity import Cost, Size
from fmupsample.upsamplers.official.checkpoints import published
from fmupsample.upsamplers.registry import METHODS, Method, Needs

_NEEDS = {
    Needs.NOTHING: "nothing",
    Needs.ANY_HEAD: "nothing",  # it is shipped
    Needs.OWN_HEAD: "a head for the backbone",
}


@dataclass(frozen=True)
class Entry:
    """One method, with its default options for features of so many channels.

    Attributes:
        needs: what one must have to use it, in words.
        guidance: ``"picture"`` or ``""``.
        ratio: ``"any"``, or the only one, such as ``"2"``.
        linear: any affine map may be applied before it.
        cost: of one picture at the sizes asked for.
    """

    method: Method
    needs: str
    guidance: str
    ratio: str
    linear: bool
    cost: Cost


def catalogue(channels: int, cells: Size, pixels: Size) -> list[Entry]:
    """All methods, for features ``[C, h, w]`` upsampled to ``H x W``."""
    return [_entry(row, channels, cells, pixels) for row in METHODS.values()]


def _entry(row: Method, channels: int, cells: Size, pixels: Size) -> Entry:
    module = row.build({} if row.config is None else row.options(channels))
    checkpoint = published(row.name)
    return Entry(
        method=row,
        needs=_NEEDS[row.needs] if checkpoint is None else checkpoint.needs,
        guidance="picture" if module.needs_guidance else "",
        ratio="any" if module.fixed_ratio is None else str(module.fixed_ratio),
        linear=module.linear_in_value,
        cost=module.cost(channels, cells, pixels),
    )
