"""The ``fmupsample`` command: which commands there are, and nothing else.

Each command is one plain function in its own module. Those modules import only Typer, the shared
options and the standard library at the top and torch, timm and the library inside the function, so
that ``--help``, ``--version`` and shell completion answer at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import Annotated

import typer

from fmupsample._version import __version__
from fmupsample.heap import keep_freed_memory
from fmupsample.waiting import spin_briefly
from fmupsample_cli.errors import run
from fmupsample_cli.groups import expand
from fmupsample_cli.progress import renamings_told

FEATURES = "Features"
TOOLS = "Tools"

# (module in this package, function or group = name of the command, panel of the help page)
COMMANDS = (
    ("visualize", "visualize", FEATURES),
    ("extract", "extract", FEATURES),
    ("train", "train", FEATURES),
    ("probe", "probe", FEATURES),
    ("export", "export", FEATURES),
    ("bench", "bench", TOOLS),
    ("models", "models", TOOLS),
    ("build", "build", TOOLS),
    ("doctor", "doctor", TOOLS),
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fmupsample {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Dense, edge-sharp features from frozen vision models.

    A vision foundation model gives one feature vector per 14 or 16 pixels; fmupsample gives one
    per pixel. Start with

        fmupsample visualize photos/ -o pictures/

    which works offline with the model shipped in the package. Set FMUPSAMPLE_DEBUG=1 to see the
    traceback of an error.
    """


def build_app() -> typer.Typer:
    """The Typer application with every command registered."""
    app = typer.Typer(
        name="fmupsample",
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for module, function, panel in COMMANDS:
        command = getattr(import_module(f"fmupsample_cli.{module}"), function)
        if isinstance(command, typer.Typer):  # a group of commands
            app.add_typer(command, name=function, rich_help_panel=panel)
        else:
            app.command(name=function, rich_help_panel=panel)(expand(command))
    return app


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code (see :mod:`fmupsample_cli.errors`)."""
    if arguments is None:  # the process is this command's own
        keep_freed_memory()
        spin_briefly()
    with renamings_told():
        return run(build_app(), arguments)
