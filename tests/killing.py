"""Runs of ``fmupsample extract`` that are killed at a chosen moment, many in a few seconds.

Started as a script, it imports everything once and then forks a real process for each line of JSON
on standard input: ``{"arguments": [...], "moment": n, "stop": bool}``. With ``moment`` the process
kills (or stops) itself just before its n-th dealing with the disk: the opening, renaming or
removing of a file, or the writing of bytes, of which it then leaves half. It answers with the
number of the process, and when that has ended with how it ended, what it said, and how many moments
there were.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

_EVENTS = frozenset(
    {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.ftruncate"}
)


class Runs:
    """``with Runs() as runs``: ``begin`` one, perhaps kill it, and see how it ``end``-ed."""

    def __enter__(self) -> Runs:
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stdin.close()
        self.server.wait(10)

    def begin(self, *arguments: object, moment: int | None = None, stop: bool = False) -> int:
        """Its process number; with ``stop``, once it has stopped at the moment."""
        job = {"arguments": [str(a) for a in arguments], "moment": moment, "stop": stop}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def end(self) -> tuple[int, str, int]:
        """Its exit code (negative: the signal), standard error, and the moments it had.

        Its number is nobody else's until this is called.
        """
        self.server.stdin.write("\n")
        self.server.stdin.flush()
        code, said, moments = json.loads(self.server.stdout.readline())
        return code, said, moments

    def run(self, *arguments: object, moment: int | None = None) -> tuple[int, str, int]:
        self.begin(*arguments, moment=moment)
        return self.end()


def _serve() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from drawn import Blocks, PatchMeans
    from PIL import Image

    from fmupsample.upsamplers import load_upsampler
    from fmupsample_cli import loading
    from fmupsample_cli.main import main

    Image.init()

    def load(backbone, layer, weights, upsampler, *rest, **more):
        model = PatchMeans()
        return model, load_upsampler(model, upsampler) if upsampler else Blocks()

    loading.load_models = load
    while line := sys.stdin.readline():
        job = json.loads(line)
        with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as counted:
            child = os.fork()
            if child == 0:
                os.dup2(said.fileno(), 2)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                _count_moments(job["moment"], counted.fileno(), job["stop"])
                with contextlib.suppress(BaseException):
                    os._exit(main(job["arguments"]))
                os._exit(99)
            if job["stop"]:
                os.waitpid(child, os.WUNTRACED)
            print(child, flush=True)
            sys.stdin.readline()
            _, status = os.waitpid(child, 0)
            said.seek(0)
            moments = os.fstat(counted.fileno()).st_size
            answer = os.waitstatus_to_exitcode(status), said.read().decode(), moments
            print(json.dumps(answer), flush=True)


def _count_moments(last: int | None, counted: int, stop: bool) -> None:
    """From now on, of this process; each leaves a byte in the file ``counted``."""
    from fmupsample.formats.files import TensorFile

    write, append, seen = os.write, TensorFile.append, 0
    end = signal.SIGSTOP if stop else signal.SIGKILL

    def moment() -> bool:
        nonlocal seen
        seen += 1
        write(counted, b".")
        return seen == last

    def audited(event: str, arguments: tuple) -> None:
        # Reading is no dealing that matters; opening is audited with its flags.
        if event not in _EVENTS or (event == "open" and not (arguments[2] or 0) & 3):
            return
        if moment():
            os.kill(os.getpid(), end)

    def torn(handle: int, data: bytes) -> int:
        if moment():
            if not stop:
                write(handle, data[: len(data) // 2])
            os.kill(os.getpid(), end)
        return write(handle, data)

    def begun(self: TensorFile, rows: object) -> None:
        self._file.flush()  # its header is there
        if moment():
            os.kill(os.getpid(), end)
        append(self, rows)

    sys.addaudithook(audited)
    os.write = torn
    TensorFile.append = begun


if __name__ == "__main__":
    _serve()
