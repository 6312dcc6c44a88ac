"""Options and words for the videos that a command line names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fmupsample.images import Source
    from fmupsample.video import Clip

VIDEOS = "Videos"

Every = Annotated[
    int | None,
    typer.Option(
        "--every",
        min=1,
        metavar="N",
        help="Of a video, take the first frame and every N-th after it. Default: all frames.",
        show_default=False,
        rich_help_panel=VIDEOS,
    ),
]
From = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="TIME",
        help="Leave out what a video shows before: seconds (90.5) or h:mm:ss (0:01:30.5).",
        show_default=False,
        rich_help_panel=VIDEOS,
    ),
]
To = Annotated[
    str | None,
    typer.Option(
        "--to",
        metavar="TIME",
        help="Leave out what a video shows from then on.",
        show_default=False,
        rich_help_panel=VIDEOS,
    ),
]
Inputs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="IMAGES...",
        help="Pictures and videos, folders (searched recursively) or quoted globs such as "
        "'photos/*.jpg'.",
        show_default=False,
    ),
]


def look_into(
    sources: Sequence[Source],
    every: int | None,
    start: str | None,
    stop: str | None,
    *,
    quiet: bool,
) -> list[Clip]:
    """The frames that are wanted of each video among ``sources``.

    Raises:
        UsageError: options for videos that cannot be honoured, or without a video.
    """
    from fmupsample.images import is_video
    from fmupsample.video import wanted_clips

    if not any(is_video(source) for source in sources):
        return wanted_clips(sources, every, start, stop)
    from fmupsample_cli.progress import RichProgress

    with RichProgress(quiet=quiet, unit="videos") as progress:
        return wanted_clips(sources, every, start, stop, progress=progress)


def pictures_in(sources: Sequence[Source]) -> list[Source]:
    """``sources`` without the videos."""
    from fmupsample.images import is_video

    return [source for source in sources if not is_video(source)]


def training_pictures(sources: Sequence[Source]) -> list[Source]:
    """What ``--fit-head`` trains on.

    Raises:
        UsageError: there are only videos.
    """
    from fmupsample.errors import UsageError

    pictures = pictures_in(sources)
    if not pictures:
        raise UsageError(
            "--fit-head trains on pictures, and only videos are named: name pictures as well, or "
            "train on others with `fmupsample train` and give --head"
        )
    return pictures


def videos_text(clips: Sequence[Clip]) -> str:
    """For the table at the end of a run."""
    frames = sum(len(clip.frames) for clip in clips)
    text = f"{len(clips)}, {frames} frame{'' if frames == 1 else 's'} of "
    text += "it" if len(clips) == 1 else "them"
    unusable = sum(bool(clip.error) for clip in clips)
    broken = sum(bool(clip.broken) for clip in clips)
    if broken:
        text += f"; {broken} break{'s' if broken == 1 else ''} off before the end"
    if unusable:
        text += f"; {unusable} cannot be used"
    return text
