"""What the project holds itself to, and whether a run keeps it.

CPU bars are about one picture of 448 px, GPU bars about a batch of eight on an H200-class machine;
both with 384 channels at ratio 14.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

MB = 1e6


@dataclass(frozen=True)
class Bar:
    """One limit. ``value`` reads it from a result; ``KeyError`` says that it was not measured."""

    name: str
    device: str  # "cpu" or "cuda"
    limit: float
    unit: str
    value: Callable[[dict], float]
    at_least: bool = False

    def applies_to(self, result: dict) -> bool:
        s = result["setting"]
        batch = 8 if self.device == "cuda" else 1
        sizes = (s["size"], s["channels"], s["ratio"], s["batch"])
        return result["device"] == self.device and sizes == (448, 384, 14, batch)

    def verdict(self, value: float) -> str:
        kept = value >= self.limit if self.at_least else value <= self.limit
        return "PASS" if kept else "MISS"


def _seconds(result: dict, case: str) -> float:
    return result["cases"][case]["median_s"]


def _ratio(device: str, case: str, base: str, limit: float) -> Bar:
    return Bar(
        f"{case} / {base}", device, limit, "x", lambda r: _seconds(r, case) / _seconds(r, base)
    )


def _copy_share(dtype: str) -> Callable[[dict], float]:
    """Bytes that reassembly must move, per second, over those that a copy moves."""

    def value(result: dict) -> float:
        rate = result["moved_bytes"][dtype] / _seconds(result, f"reassembly {dtype}")
        copied = 2 * result["output_bytes"][dtype] / _seconds(result, f"copy {dtype}")
        return rate / copied

    return value


def _ms_a_picture(case: str) -> Callable[[dict], float]:
    return lambda result: 1e3 * _seconds(result, case) / result["setting"]["batch"]


def _peak_and_output(result: dict, case: str) -> tuple[int, int]:
    return result["cases"][case]["peak_bytes"], result["output_bytes"][case.rpartition(" ")[2]]


def _beyond_output(case: str) -> Callable[[dict], float]:
    def value(result: dict) -> float:
        peak, output = _peak_and_output(result, case)
        return (peak - output) / MB

    return value


def _extra_of_output(case: str) -> Callable[[dict], float]:
    def value(result: dict) -> float:
        peak, output = _peak_and_output(result, case)
        return (peak - output) / output

    return value


def _error(dtype: str) -> Callable[[dict], float]:
    return lambda result: result["error_ratio"][dtype]


def _errors(device: str) -> list[Bar]:
    return [
        Bar(f"error {dtype} / that of plain PyTorch", device, 2.0, "x", _error(dtype))
        for dtype in ("fp32", "bf16")
    ]


BARS = [
    _ratio("cpu", "reassembly fp32", "bilinear fp32", 1.0),
    _ratio("cpu", "whole head fp32", "backbone fp32", 1.5),
    _ratio("cpu", "whole head bf16", "backbone fp32", 0.8),
    _ratio("cpu", "masks fp32", "backbone fp32", 1.2),
    Bar("whole head fp32: peak - output", "cpu", 200, "MB", _beyond_output("whole head fp32")),
    *_errors("cpu"),
    *(
        Bar(f"reassembly {dtype} / copy rate", "cuda", 0.7, "x", _copy_share(dtype), at_least=True)
        for dtype in ("fp32", "bf16")
    ),
    _ratio("cuda", "both gradients fp32", "reassembly fp32", 3.0),
    _ratio("cuda", "both gradients bf16", "reassembly bf16", 3.0),
    Bar("whole head bf16, a picture", "cuda", 1.0, "ms", _ms_a_picture("whole head bf16")),
    Bar("whole head bf16: extra / output", "cuda", 1.2, "x", _extra_of_output("whole head bf16")),
    Bar("masks bf16, a picture", "cuda", 0.4, "ms", _ms_a_picture("masks bf16")),
    *_errors("cuda"),
]


def evaluate(results: list[dict], bars: list[Bar] | None = None) -> list[dict]:
    """Every bar with its value and ``PASS``, ``MISS`` or ``not measured``.

    Args:
        bars: others than those of upsampling.
    """
    rows = []
    for bar in BARS if bars is None else bars:
        value = None
        for result in results:
            if bar.applies_to(result):
                try:
                    value = bar.value(result)
                except KeyError:
                    continue
        rows.append(
            {
                "bar": bar.name,
                "device": bar.device,
                "limit": bar.limit,
                "at_least": bar.at_least,
                "unit": bar.unit,
                "value": value,
                "verdict": "not measured" if value is None else bar.verdict(value),
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    """The rows of :func:`evaluate` for reading."""
    lines = []
    for row in rows:
        value = "" if row["value"] is None else f"{row['value']:.3g} {row['unit']}"
        limit = f"{'>=' if row['at_least'] else '<='} {row['limit']:g} {row['unit']}"
        lines.append(
            f"{row['device']:5s} {row['bar']:38s} {value:>10s}   {limit:12s} {row['verdict']}"
        )
    return "\n".join(lines)
