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
    from fmupsample.errors import UsageError
    from fmupsample.images import is_video

    given = {"--every": every, "--from": start, "--to": stop}
    named = [option for option, value in given.items() if value is not None]
    if not any(is_video(source) for source in sources):
        if named:
            verb = "is" if len(named) == 1 else "are"
            raise UsageError(f"{' and '.join(named)} {verb} for videos, and there is none here")
        return []
    from fmupsample.video import Span, scan_videos
    from fmupsample_cli.progress import RichProgress

    span = Span.parse(every, start, stop)
    with RichProgress(quiet=quiet, unit="videos") as progress:
        return scan_videos(sources, span, progress=progress)


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
