"""The pictures that a command line names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fmupsample.images import Source

_SEVERAL = "extract, visualize, probe predict and train"


def find_pictures(
    images: list[str] | None, list_file: Path | None, output: Path, *, videos: bool = False
) -> tuple[list[Source], bool]:
    """They, and whether all are there: folders that cannot be read are warned of and left out.

    Args:
        videos: look for videos as well.

    Raises:
        UsageError: as :func:`fmupsample.images.find_images`.
    """
    from fmupsample.images import find_images
    from fmupsample_cli.progress import warn

    left_out: list[str] = []

    def say(message: str) -> None:
        left_out.append(message)
        warn(message)

    found = find_images(
        images or [], list_file=list_file, exclude=[output], warn=say, videos=videos
    )
    return found, not left_out


def refuse_several(command: str) -> None:
    """Raise a UsageError, in the first of several processes, where a command is for one alone."""
    from fmupsample.distributed import is_distributed, leads
    from fmupsample.errors import ProcessError, UsageError

    if is_distributed():
        text = f"{command} is for one process: torchrun is for {_SEVERAL}"
        raise UsageError(text) if leads() else ProcessError(text)


def refuse_to_fit(fit_head: bool) -> None:
    """Raise a UsageError where several processes were told to train a head first."""
    from fmupsample.errors import UsageError

    if fit_head:
        raise UsageError(
            "--fit-head is for one process: train with `torchrun -m fmupsample train` first, "
            "and name the head with --head"
        )


def refuse_ray(several: bool) -> None:
    """Raise a UsageError where ``--ray`` cannot be honoured."""
    from importlib.util import find_spec

    from fmupsample.errors import UsageError

    if several:
        raise UsageError(
            "--ray and torchrun exclude each other: each shares the pictures by itself"
        )
    if find_spec("ray") is None or find_spec("pyarrow") is None:
        raise UsageError("--ray needs Ray Data: pip install 'fmupsample[ray]'")
