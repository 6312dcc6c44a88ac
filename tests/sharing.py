"""Processes that share a run: real ones of ``torchrun``, or threads that stand for them.

As a script it is a process of ``torchrun`` and runs commands one after the other, with the drawn
backbone. It is started with a line of JSON: ``{"commands": [[...], ...], "kill": [rank, lines]}``;
process ``rank`` kills itself in the last command, after it has written so many lines into its
manifest. The first process prints a line of JSON for each command: exit code, standard output,
standard error.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file
from torch import distributed

from fmupsample.runs.workers import Workers


def in_threads(size: int, work: Callable[[Workers], object]) -> list[object]:
    """``work(team)`` in ``size`` threads; what each returned or raised."""
    store = distributed.HashStore()
    ends: list[object] = [None] * size

    def one(rank: int) -> None:
        team = Workers(store, rank, size)
        try:
            ends[rank] = work(team)
        except Exception as error:
            team.fail()
            ends[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return ends


def visible(out: Path) -> dict[str, object]:
    """Every file; of the basis, whose header has no order, only the numbers."""
    assert list(out.rglob(".*")) == []
    return {
        str(path.relative_to(out)): path.read_bytes()
        if path.name != "pca.safetensors"
        else {name: numbers.tolist() for name, numbers in load_file(path).items()}
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "manifest.jsonl"
    }


def drawn(out: Path) -> dict[str, object]:
    """Of ``visualize``, every file but the log; of the basis only the numbers."""
    assert [path.name for path in out.rglob(".*")] == [".fmupsample"]
    return {
        str(path.relative_to(out)): path.read_bytes()
        if path.suffix != ".safetensors"
        else {name: numbers.tolist() for name, numbers in load_file(path).items()}
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.parent.name != ".fmupsample"
    }


def logged(out: Path) -> dict[str, dict]:
    """Of ``visualize``, the log, which is whole and alone."""
    from fmupsample.runs.manifest import Manifest

    assert [path.name for path in (out / ".fmupsample").iterdir()] == ["manifest.jsonl"]
    found = Manifest(out / ".fmupsample").records
    return {
        key: {k: v for k, v in record.items() if k != "seconds"} for key, record in found.items()
    }


def records(out: Path) -> list[dict]:
    """The manifest's, without what differs from run to run."""
    lines = (out / "manifest.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def torchrun(processes: int, *commands: list, kill: tuple[int, int] = (-1, 0)) -> tuple:
    """The exit code of ``torchrun``, standard error, and what each command came to."""
    work = {"commands": [[str(word) for word in c] for c in commands], "kill": kill}
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc-per-node={processes}", __file__, json.dumps(work)],
        capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return ended.returncode, ended.stderr, [json.loads(line) for line in ended.stdout.splitlines()]


def _kill_after(lines: int) -> None:
    from fmupsample.runs.manifest import Manifest

    append, written = Manifest.append, 0

    def counted(self: Manifest, record: dict) -> None:
        nonlocal written
        append(self, record)
        written += 1
        if written == lines:
            os.kill(os.getpid(), signal.SIGKILL)

    Manifest.append = counted


def _main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from drawn import Blocks, PatchMeans

    from fmupsample.upsamplers import load_upsampler
    from fmupsample_cli import loading
    from fmupsample_cli.main import main

    def load(backbone, layer, weights, upsampler, *rest, **more):
        model = PatchMeans()
        return model, load_upsampler(model, upsampler) if upsampler else Blocks()

    loading.load_models = load
    work = json.loads(sys.argv[1])
    rank, lines = work["kill"]
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    for command in work["commands"]:
        if command == work["commands"][-1] and int(os.environ["RANK"]) == rank and first:
            _kill_after(lines)
        out, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            code = main(command)
        if os.environ["RANK"] == "0":
            print(json.dumps([code, out.getvalue(), error.getvalue()]), flush=True)
        elif code or out.getvalue() or error.getvalue():
            said = out.getvalue() + error.getvalue() or "nothing"
            print(f"process {os.environ['RANK']}: code {code}, said {said}", file=sys.stderr)


if __name__ == "__main__":
    _main()
