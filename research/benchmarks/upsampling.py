"""How long upsampling takes and how much memory, against what people would compare it with.

    python research/benchmarks/upsampling.py --quick -o numbers.json
    python research/benchmarks/upsampling.py --sweep --plot growth.png -o numbers.json

Everything in one setting is timed in one run, interleaved, so that ratios mean something even where
the machine is not steady. research/benchmarks/README.md says what each number is.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

import bars
from cases import (
    BACKBONES,
    BACKWARD,
    DTYPES,
    FORWARD,
    MOST_CPU_TOKENS,
    MOST_LITERAL_PIXELS,
    Setting,
    moved_bytes,
    runners,
)
from common import options, parse_options, tell_faults
from errors import measure_errors, worst_ratio
from fmupsample.bench.measuring import time_cases
from fmupsample.device import resolve_device
from fmupsample.memory import available_memory
from fmupsample.ops.backend import set_backend
from reports import Report, key

SWEEPS = {
    "size": [224, 448, 896, 2048],
    "channels": [192, 768],
    "ratio": [8, 16],
    "batch": [8],
}
# Backward needs several maps of the output's size; these are the largest pictures for it.
MOST_BACKWARD_SIZE = {"cpu": 448, "cuda": 896}
# Cases whose memory is measured, which costs some calls each; fewer of them in sweeps on a CPU.
PEAKS = ("bilinear", "reassembly", "whole head", "masks", "training step")
SWEEP_PEAKS = ("reassembly", "whole head")
# What the head takes beside its output, per pixel; measured at 448 px in fp32.
HEAD_BYTES = 1200


def sweep_part(text: str) -> tuple[str, list[int]]:
    """``"size"`` with its usual values, or ``"size=448,896"``."""
    name, _, values = text.partition("=")
    if name not in SWEEPS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(SWEEPS)}")
    return name, [int(value) for value in values.split(",")] if values else SWEEPS[name]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = options(__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="one setting, with errors and the definition")
    add(
        "--sweep",
        nargs="*",
        type=sweep_part,
        metavar="PART[=N,N]",
        help=f"one thing varied at a time; all of {', '.join(SWEEPS)} where none is named",
    )
    add("--size", type=int, default=448, help="pixels of the square picture (448)")
    add("--channels", type=int, default=384, choices=list(BACKBONES))
    add("--ratio", type=int, default=14)
    add("--batch", type=int, help="pictures at once (--quick on a GPU: 8, else 1)")
    add("--dtype", choices=[*DTYPES, "both"], default="both", help="of the features")
    add("--rounds", type=int, default=7)
    add(
        "--seconds",
        type=float,
        default=50,
        help="begin no further round of a setting after this (three are run at least)",
    )
    add("--budget", type=float, help="seconds after which no further setting is begun")
    add("--device", default="auto")
    add("--backend", default="auto", help="what computes the operators: auto, torch or cuda")
    add("--no-backward", action="store_true")
    add("--no-memory", action="store_true", help="without peak memory")
    add("--no-literal", action="store_true", help="without the definition's time, which is long")
    add("--plot", type=Path, help="PNG of the growth with pixels and channels, after a sweep")
    args = parse_options(parser, arguments)
    if not args.quick and args.sweep is None:
        args.quick = True
    args.dtypes = list(DTYPES) if args.dtype == "both" else [args.dtype]
    return args


def settings(args: argparse.Namespace, device: torch.device) -> list[tuple[Setting, bool]]:
    """What to measure, each with whether it is the quick, thorough one."""
    base = Setting(args.size, args.channels, args.ratio, args.batch or 1)
    chosen: dict[Setting, bool] = {}
    if args.quick:
        on_gpu = device.type == "cuda" and args.batch is None
        chosen[replace(base, batch=8) if on_gpu else base] = True
    for part, values in list(SWEEPS.items()) if args.sweep == [] else args.sweep or []:
        if part == "batch" and device.type != "cuda":
            continue
        for value in values:
            chosen.setdefault(replace(base, **{part: value}), False)
    # The large ones last: where time runs out, the rest is there.
    return sorted(chosen.items(), key=lambda item: item[0].output_bytes("fp32"))


def names(
    setting: Setting, args: argparse.Namespace, device: torch.device, thorough: bool
) -> tuple[list[str], dict[str, str]]:
    """The cases of a setting, and those left out with the reason."""
    dtypes = args.dtypes
    wanted, skipped = [], {}
    tokens = setting.batch * setting.cells**2
    for dtype in DTYPES:
        if device.type == "cpu" and tokens > MOST_CPU_TOKENS:
            skipped[f"backbone {dtype}"] = f"{tokens} tokens take minutes on a CPU"
        else:
            wanted.append(f"backbone {dtype}")
    wanted += [f"{what} {dtype}" for what in FORWARD for dtype in dtypes]
    if thorough:
        wanted += [f"joint bilateral {dtype}" for dtype in dtypes]
    if not args.no_backward:
        backward = [f"{what} {dtype}" for what in BACKWARD for dtype in dtypes]
        most = MOST_BACKWARD_SIZE.get(device.type, 448)
        if setting.size <= most:
            wanted += backward
        else:
            skipped |= dict.fromkeys(backward, f"backward is measured up to {most} px")
    return wanted, skipped


def room(setting: Setting, args: argparse.Namespace, device: torch.device) -> str | None:
    """Why a setting does not fit into memory, or ``None``.

    The copies' sources stay while the head makes an output and its own maps.
    """
    outputs = [setting.output_bytes(dtype) for dtype in args.dtypes]
    need = sum(outputs) + max(outputs) + HEAD_BYTES * setting.batch * setting.size**2 + 2e9
    free = available_memory(device)
    if free is not None and need > free:
        return f"needs about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    return None


def measure(
    setting: Setting, args: argparse.Namespace, device: torch.device, thorough: bool
) -> dict:
    """Everything about one setting, as it goes into the JSON."""
    wanted, skipped = names(setting, args, device, thorough)
    result = {
        "output_bytes": {dtype: setting.output_bytes(dtype) for dtype in args.dtypes},
        "moved_bytes": moved_bytes(setting, args.dtypes, device),
    }
    few = device.type == "cpu" and not thorough
    kinds, dtypes = (SWEEP_PEAKS, args.dtypes[:1]) if few else (PEAKS, args.dtypes)

    def peaks(name: str) -> bool:
        what, _, dtype = name.rpartition(" ")
        return not args.no_memory and what in kinds and dtype in dtypes

    with runners(setting, wanted, device) as (found, failed):
        skipped |= failed
        result["cases"], failed = time_cases(found, args.rounds, seconds=args.seconds, peaks=peaks)
        skipped |= failed
    if thorough and not args.no_literal:
        if setting.batch * setting.size**2 > MOST_LITERAL_PIXELS:
            skipped["literal fp32"] = "the definition is measured on one picture of 448 px at most"
        else:  # once: it takes long
            with runners(setting, ["literal fp32"], device) as (found, _):
                result["cases"] |= time_cases(found, 1)[0]
    result["skipped"] = skipped
    if thorough:
        result["errors"] = {dtype: measure_errors(dtype, device) for dtype in args.dtypes}
        result["error_ratio"] = {
            dtype: worst_ratio(parts) for dtype, parts in result["errors"].items()
        }
    return result


def show(result: dict) -> None:
    """One setting as a table, in milliseconds and against its peers."""
    setting, cases = Setting(**result["setting"]), result["cases"]
    print(f"\n{setting}, {result['device']}, {result['backend']}")
    print(
        f"{'':24s} {'median':>10s}  {'quartiles, ms':>21s} {'backbone':>9s} {'bilinear':>9s}",
        end="",
    )
    print(f" {'copy':>7s} {'peak, MB':>9s}")
    for name, row in cases.items():
        dtype = name.rpartition(" ")[2]
        low, high = row["quartiles_s"]
        line = f"{name:24s} {1e3 * row['median_s']:10.3f}  {1e3 * low:10.3f} {1e3 * high:10.3f}"
        for base, width in (
            ("backbone fp32", 9),
            (f"bilinear {dtype}", 9),
            (f"copy {dtype}", 7),
        ):
            ratio = row["median_s"] / cases[base]["median_s"] if base in cases else None
            line += f" {'' if ratio is None else f'{ratio:.2f} x':>{width}s}"
        if "peak_bytes" in row:
            line += f" {row['peak_bytes'] / 1e6:9.0f}"
        print(line)
    for dtype, parts in result.get("errors", {}).items():
        for part, values in parts.items():
            said = ", ".join(f"{who} {value:.2e}" for who, value in values.items())
            print(f"error of {part} {dtype}: {said}")
    for name, reason in result["skipped"].items():
        print(f"{name}: not measured, {reason}")


def draw(report: Report, dtype: str, path: Path) -> None:
    """The growth, where matplotlib is there and settings differ in one size alone."""
    try:
        from plots import growth
    except ImportError:
        print("no plot: it takes matplotlib")
        return
    figure = growth(report.results, dtype, report.machine)
    if figure is None:
        print("no plot: it takes a sweep of sizes or channels")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    begun = time.perf_counter()
    device = resolve_device(args.device)
    set_backend(args.backend)
    report = Report(args.output, device)
    skipped: dict[str, str] = {}

    def save() -> None:
        report.write(skipped=skipped, bars=bars.evaluate(report.results))

    for setting, thorough in settings(args, device):
        if not thorough and _has_thorough(report, setting):
            print(f"\n{setting}: kept as a --quick run measured it, with errors and peaks")
            continue
        reason = room(setting, args, device)
        if args.budget and time.perf_counter() - begun > args.budget:
            reason = f"the budget of {args.budget:g} s was used up"
        if reason:
            skipped[str(setting)] = reason
            print(f"\n{setting}: not measured, {reason}")
            continue
        show(report.add(asdict(setting), **measure(setting, args, device, thorough)))
        save()  # after each: a run that is cut short leaves the rest
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print("\n" + bars.table(bars.evaluate(report.results)))
    save()
    if args.plot:
        draw(report, args.dtypes[0], args.plot)


def _has_thorough(report: Report, setting: Setting) -> bool:
    wanted = report.result(asdict(setting))
    return any(key(result) == key(wanted) and "errors" in result for result in report.results)


if __name__ == "__main__":
    tell_faults(main)
