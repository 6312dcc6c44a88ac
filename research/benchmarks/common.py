"""What the scripts share: their options, how a fault is told, and how a JSON file is written."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fmupsample.atomic import replacing
from fmupsample.errors import FmupsampleError, OutputError

KEPT = "JSON; other settings already in it are kept"


def options(
    description: str | None, output: str = KEPT, *, required: bool = False
) -> argparse.ArgumentParser:
    """A parser with ``--threads`` and ``--output`` (whose help is ``output``)."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch (as many as it chooses)")
    parser.add_argument("-o", "--output", type=Path, required=required, help=output)
    return parser


def parse_options(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """The arguments, with ``--threads`` in force."""
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def tell_faults(main: Callable[[], object]) -> None:
    """Run a script; what the user can mend is one sentence."""
    try:
        main()
    except FmupsampleError as error:
        raise SystemExit(f"error: {error}") from error


def write_text(path: Path | None, text: str) -> None:
    """Write a file whole or not at all; nothing for ``None``.

    Raises:
        OutputError: it cannot be written.
    """
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(text)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}") from error


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")
