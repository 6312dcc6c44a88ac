"""What the user sees when something goes wrong, and the exit codes.

0 done; 1 an error, nothing (more) was done; 2 the command line itself was wrong; 3 the run
finished but some pictures failed (raised by the commands as ``typer.Exit(3)``); 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback

import typer

from fmupsample.distributed import leads
from fmupsample.errors import FmupsampleError, ProcessError, one_line

INTERRUPTED = 130

_OS_ERRORS = {
    errno.ENOSPC: "no space left on the disk; free some, or choose another folder with --output",
    errno.EDQUOT: "the disk quota is used up; free some space, or choose another folder",
    errno.EROFS: "that place is read-only; choose another folder with --output",
    errno.EACCES: "permission denied",
    errno.EMFILE: "too many open files; raise the limit with `ulimit -n 4096` or lower --workers",
}

# How newer versions of Typer word what does not fit an option, and the same in plain words.
_CHECKED = (
    (r"Value error, ", ""),
    (r"Input should be greater than or equal to (\S+)", r"it must be \1 or more"),
    (r"Input should be less than or equal to (\S+)", r"it must be \1 or less"),
    (r"Input should be (greater|less) than (\S+)", r"it must be \1 than \2"),
    (r"Input should be a valid integer.*", "it must be a whole number"),
    (r"Input should be a valid number.*", "it must be a number"),
)


def debugging() -> bool:
    """Whether tracebacks were asked for with FMUPSAMPLE_DEBUG=1."""
    return os.environ.get("FMUPSAMPLE_DEBUG", "") not in ("", "0")


def run(app: typer.Typer, arguments: list[str] | None = None) -> int:
    """Run ``app`` on ``arguments`` (default: the process's own) and return the exit code.

    Prints one line ``error: ...`` on stderr instead of a traceback; with FMUPSAMPLE_DEBUG=1 the
    traceback stands above it.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that knows few characters is no error
            stream.reconfigure(errors="backslashreplace")
    try:
        result = app(args=arguments, prog_name="fmupsample", standalone_mode=False)
    except SystemExit as stop:  # raised by Typer on a broken pipe, and by rich
        code = stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        code = 1
    except Exception as error:
        message, code = explain(error)
        if message and (leads() or not isinstance(error, ProcessError)):
            _say(message, error)
    else:
        code = result if isinstance(result, int) else 0
    if code == INTERRUPTED and leads():
        _say("interrupted", None, prefix="")
    return _close(code)


def explain(error: Exception) -> tuple[str, int]:
    """The sentence for the user, and the exit code, of any exception."""
    if isinstance(error, FmupsampleError):
        return str(error), error.exit_code
    if isinstance(error, typer.Abort):
        return "stopped", 1
    # Typer's own usage errors: their class moved between Typer versions, so go by what they have.
    if callable(getattr(error, "format_message", None)) and hasattr(error, "exit_code"):
        return _usage_message(error), error.exit_code
    if isinstance(error, OSError):
        what = _OS_ERRORS.get(error.errno) or error.strerror or str(error)
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{what}", 1
    text = str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return _out_of_memory(), 1
    if "not enough memory" in text or "can't allocate memory" in text:
        return _out_of_memory(), 1
    if "No space left on device" in text:  # safetensors hides the errno
        return _OS_ERRORS[errno.ENOSPC], 1
    first = text.strip().splitlines()[0] if text.strip() else "no message"
    return (
        f"unexpected {type(error).__name__}: {first} (this is a fault in fmupsample; "
        "FMUPSAMPLE_DEBUG=1 shows where)"
    ), 1


def _out_of_memory() -> str:
    return (
        "out of memory; use a smaller --image-size, --batch-size 1, --precision bf16, "
        "or --device cpu"
    )


def _usage_message(error: Exception) -> str:
    message = error.format_message().strip().rstrip(".")
    for pattern, plain in _CHECKED:
        message = re.sub(pattern, plain, message)
    if type(error).__name__ == "NoArgsIsHelpError":  # the help page has been printed
        return ""
    context = getattr(error, "ctx", None)
    return f"{message} (see `{context.command_path} --help`)" if context else message


def _say(message: str, error: Exception | None, prefix: str = "error: ") -> None:
    try:
        if error is not None and debugging():
            traceback.print_exception(error)
        print(f"{prefix}{one_line(message)}", file=sys.stderr)
    except OSError:  # nobody reads it, or the disk that it goes to is full
        pass


def _close(code: int) -> int:
    """Flush stdout and return the exit code: ``code``, or 1 if stdout could not be written.

    A reader that went away (``| head``) is no error worth a message.
    """
    if sys.stdout is None:  # the process was started without one
        return code
    try:
        sys.stdout.flush()
    except ValueError:  # closed already
        pass
    except OSError as error:
        # Python flushes again at exit: give it a place where that works.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            _say(f"standard output cannot be written: {error.strerror}", error)
            return code or 1
    return code
