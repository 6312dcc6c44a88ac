"""``fmupsample build``: compile the CUDA extension now, and not at the first use."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fmupsample_cli.options import Json, Quiet

if TYPE_CHECKING:
    from fmupsample.ops.building.cache import Library


def build(
    arch: Annotated[
        str | None,
        typer.Option(
            "--arch",
            metavar="LIST",
            help="GPU architectures, e.g. 8.0,9.0+PTX; all: 7.5 to 9.0 and PTX for newer ones; "
            "native: the GPUs of this machine. Default: native, or without a GPU "
            "$TORCH_CUDA_ARCH_LIST, or all.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Compile even if it is there already.")
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            "-j",
            min=1,
            metavar="N",
            help="Compilers at a time. Default: $MAX_JOBS, or one for each processor.",
            show_default=False,
        ),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show what the compilers are told, and say.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compile the CUDA extension, which makes upsampling on a GPU faster.

    It is compiled by itself at the first use on a GPU; this does it ahead, for other GPUs, or once
    more after a failure. It needs nvcc of the same major CUDA version as PyTorch, a C++ compiler
    and ninja. A GPU is not needed. Exit code 1 if it cannot be done, with the reason.

        fmupsample build

        fmupsample build --arch all --force
    """
    from fmupsample.errors import ExtensionError
    from fmupsample.ops.building.extension import EXTENSION, capabilities
    from fmupsample.wording import human_bytes
    from fmupsample_cli.progress import BuildLine
    from fmupsample_cli.report import print_json, print_summary

    try:
        default = "native" if capabilities() else "listed"
        targets = EXTENSION.targets((arch or "").strip().lower() or default)
        # The line that counts, or what the compilers say: not both.
        with BuildLine(quiet=quiet or verbose) as line:
            library = EXTENSION.build(
                targets,
                force=force,
                jobs=jobs,
                progress=line,
                output=_to_stderr if verbose else None,
            )
        EXTENSION.open(library)
    except ExtensionError as error:
        if as_json:
            print_json({"ok": False, "kind": error.kind, "reason": str(error), "log": error.log})
            raise typer.Exit(1) from error
        raise
    rows = {
        "library": str(library.path),
        "size": human_bytes(library.bytes),
        "for": f"PyTorch {library.torch}, {', '.join(library.targets) or 'the CPU'}",
        "compiled": _when(library),
    }
    title = "the CUDA extension is " + ("compiled" if library.fresh else "there already")
    print_summary(title, rows, as_json=as_json, payload=_payload(library))


def _payload(library: Library) -> dict[str, Any]:
    return {
        "ok": True,
        "library": str(library.path),
        "bytes": library.bytes,
        "targets": list(library.targets),
        "torch": library.torch,
        "compiled": library.fresh,
        "seconds": library.seconds,
    }


def _when(library: Library) -> str:
    return f"in {library.seconds:.0f} s" + ("" if library.fresh else ", by an earlier run")


def _to_stderr(text: str) -> None:
    sys.stderr.write(text)
