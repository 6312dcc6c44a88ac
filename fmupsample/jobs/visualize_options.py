"""What ``visualize`` is asked for, and what it tells at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fmupsample.draw.renderer import LAYOUTS, Layout, Point
from fmupsample.errors import UsageError
from fmupsample.images.size import check_output_size
from fmupsample.video.clips import Clip

FORMATS = ("png", "jpg")


@dataclass(frozen=True)
class VisualizeOptions:
    """What to draw.

    Attributes:
        layout: ``"panel"``, ``"single"`` or ``"overlay"``, see :class:`.Renderer`.
        basis: ``"shared"`` (one PCA basis for all images of the run), ``"image"`` (each its own),
            or the path of a basis saved by an earlier run.
        foreground: fit and draw the PCA on each image's foreground only.
        points: pixels of the original images for similarity maps.
        image_format: ``"png"`` or ``"jpg"``.
        output_size: of single and overlay drawings (image, original, HxW, xN).
        contact_sheet: make one, of two images or more.
        overwrite: draw again what is finished.
        cache_bytes: memory for the features between the two passes.
    """

    layout: Layout = "panel"
    basis: str | Path = "shared"
    foreground: bool = False
    points: tuple[Point, ...] = ()
    image_format: str = "png"
    output_size: str = "image"
    contact_sheet: bool = True
    overwrite: bool = False
    cache_bytes: int = 2**30

    def check(self, *, videos: bool = False) -> None:
        """Raise a UsageError for what cannot be honoured, with videos or without."""
        if self.layout not in LAYOUTS:
            raise UsageError(f"layout {self.layout!r} is unknown: use {', '.join(LAYOUTS)}")
        if self.image_format not in FORMATS:
            raise UsageError(f"format {self.image_format!r} is unknown: use png or jpg")
        if check_output_size(self.output_size) != "image" and self.layout == "panel":
            raise UsageError(
                "--output-size is for --layout single and overlay; the tiles of a panel follow "
                "--image-size"
            )
        if videos and self.foreground:
            raise UsageError(
                "--foreground divides each picture by itself, which would flicker in a video: "
                "leave it away, or name pictures only"
            )


@dataclass
class Report:
    """What became of a run.

    Attributes:
        pictures: how many images there were.
        clips: the videos, see :class:`fmupsample.video.Clip`.
        drawn: files written, in the order of the images, then of the videos.
        skipped: images and videos all of whose files were there already.
        failed: ``{"source": ..., "error": ...}`` for each fault of an image or video.
        sheets: the contact sheets.
        basis: the shared basis that was used, if it is a file.
        explained: share of the features' variance that the three colours show (shared basis).
    """

    output: Path
    pictures: int
    clips: Sequence[Clip] = ()
    drawn: list[Path] = field(default_factory=list)
    skipped: int = 0
    failed: list[dict[str, str]] = field(default_factory=list)
    sheets: list[Path] = field(default_factory=list)
    basis: Path | None = None
    explained: float | None = None
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON summary."""
        return {
            "output": str(self.output),
            "pictures": self.pictures,
            "videos": [clip.to_json() for clip in self.clips],
            "drawn": [str(path) for path in self.drawn],
            "skipped": self.skipped,
            "failed": self.failed,
            "contact_sheets": [str(path) for path in self.sheets],
            "basis": str(self.basis) if self.basis else None,
            "explained_variance": self.explained,
            "seconds": round(self.seconds, 3),
        }
