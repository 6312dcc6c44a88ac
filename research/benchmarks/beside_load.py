"""What other programs on the machine cost a command, against their share of the cores.

    python research/benchmarks/beside_load.py -o beside.json -- \\
        fmupsample extract photos/ --image-size 336 -o {out}

The command runs alone and beside busy loops, in turns, after one run that does not count; ``{out}``
in it is a new folder each time. Where loops and command share the cores fairly, L loops on N cores
make it 1 + L / N times as slow; much more than that means that its threads wait for one another.
"""

from __future__ import annotations

import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from common import options, parse_options, tell_faults
from fmupsample.bench.measuring import summary
from fmupsample.errors import UsageError
from fmupsample.threads import cores
from reports import Report

WAYS = ("alone", "beside")
_LOOP = "while True: pass"


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """So many processes, each of which wants a core all the time."""
    running = [subprocess.Popen([sys.executable, "-S", "-c", _LOOP]) for _ in range(loops)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def seconds(command: Sequence[str], loops: int) -> float:
    """The time of one run.

    Raises:
        UsageError: it cannot be started, or fails.
    """
    with tempfile.TemporaryDirectory() as folder, busy(loops):
        out = str(Path(folder) / "out")
        begun = time.perf_counter()
        try:
            done = subprocess.run(
                [part.replace("{out}", out) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise UsageError(f"{command[0]} cannot be started: {error.strerror}") from error
        taken = time.perf_counter() - begun
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise UsageError(f"{command[0]} failed with code {done.returncode}: {said[0]}")
    return taken


def measure(command: Sequence[str], loops: int, rounds: int) -> dict[str, dict]:
    """Medians and quartiles of both ways, which take turns in a random order."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    seconds(command, 0)  # what is read for the first time is in memory afterwards
    generator = random.Random(0)
    for number in range(rounds):
        for way in generator.sample(WAYS, len(WAYS)):
            times[way].append(seconds(command, loops if way == "beside" else 0))
        said = ", ".join(f"{way} {times[way][-1]:.2f} s" for way in WAYS)
        print(f"round {number + 1} of {rounds}: {said}", flush=True)
    return {way: summary(own) for way, own in times.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__)
    add = parser.add_argument
    add("--loops", type=int, help="busy loops (two for each core)")
    add("--rounds", type=int, default=5)
    add("command", nargs="+", help="what to run, after --")
    args = parse_options(parser, arguments)
    here = cores()
    loops = 2 * here if args.loops is None else args.loops
    if loops < 1 or args.rounds < 1:
        raise UsageError("--loops and --rounds must be 1 or more")
    report = Report(args.output, torch.device("cpu"))
    cases = measure(args.command, loops, args.rounds)
    ratio = cases["beside"]["median_s"] / cases["alone"]["median_s"]
    fair = 1 + loops / here
    setting = {"command": shlex.join(args.command), "loops": loops, "cores": here}
    report.add(setting, cases=cases, ratio=ratio, fair=fair)
    report.write()
    medians = ", ".join(f"{way} {row['median_s']:.2f} s" for way, row in cases.items())
    print(f"{medians}: {ratio:.2f} times, by a fair share {fair:.2f}")


if __name__ == "__main__":
    tell_faults(main)
