"""Which frames of a video are meant, and times as people write them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fmupsample.errors import UsageError

_TIME = re.compile(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d*)?|\.\d+)", re.ASCII)
_ROUNDING = 1e-6  # seconds; times are sums of binary fractions


@dataclass(frozen=True)
class Span:
    """A part of a video, and how densely it is looked at.

    Attributes:
        every: the first frame of the part, and every so many-th after it.
        start: seconds; frames shown before are left out.
        stop: seconds; frames shown then or later are left out. ``None``: to the end.
    """

    every: int = 1
    start: float = 0.0
    stop: float | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UsageError(f"every {self.every}th frame is not possible: give 1 or more")
        if self.stop is not None and self.stop <= self.start:
            raise UsageError(
                f"--to {show_time(self.stop)} is not after --from {show_time(self.start)}"
            )

    @classmethod
    def parse(cls, every: int | None, start: str | None, stop: str | None) -> Span:
        """From the options of a command line; ``None``: not given.

        Raises:
            UsageError: not times, or an end before its beginning.
        """
        return cls(
            1 if every is None else every,
            0.0 if start is None else parse_time(start, "--from"),
            None if stop is None else parse_time(stop, "--to"),
        )

    def begins_by(self, time: float) -> bool:
        """Whether a frame shown at ``time`` seconds is not before the part."""
        return time >= self.start - _ROUNDING

    def ends_by(self, time: float) -> bool:
        """Whether a frame shown at ``time`` seconds is behind the part."""
        return self.stop is not None and time >= self.stop - _ROUNDING


def parse_time(text: str, option: str = "a time") -> float:
    """Seconds of ``"90"``, ``"1:30"``, ``"0:01:30.5"``.

    Raises:
        UsageError: anything else; it names ``option``.
    """
    match = _TIME.fullmatch(text.strip())
    hours, minutes, seconds = match.groups() if match else (None, None, "0")
    if match is None or (minutes is not None and float(seconds) >= 60):
        match = None
    if match is None or (hours is not None and int(minutes) >= 60):
        raise UsageError(
            f"{option} {text!r} is not understood: give seconds (90.5) or h:mm:ss (0:01:30.5)"
        )
    return int(hours or 0) * 3600 + int(minutes or 0) * 60 + float(seconds)


def show_time(seconds: float) -> str:
    """``0:01:30.5``: as :func:`parse_time` takes it, to a hundredth."""
    hundredths = round(seconds * 100)
    minutes, rest = divmod(hundredths, 6000)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}:{minutes:02}:{rest // 100:02}"
    return f"{text}.{rest % 100:02}".rstrip("0") if rest % 100 else text
