"""GPU architectures: what to compile for, and which code runs on which GPU.

Targets are named as nvcc names them: ``sm_90`` is machine code for compute capability 9.0,
``compute_90`` is PTX, which the driver compiles for GPUs of 9.0 and newer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from fmupsample.errors import ExtensionError, UsageError

Capability = tuple[int, int]

# Older GPUs lack instructions that the kernels use.
OLDEST: Capability = (7, 5)
# What is compiled where it is not known which GPU will run it.
USUAL = "7.5,8.0,8.6,8.9,9.0+PTX"
# From this capability on, the kernels choose a way that code for older GPUs does not contain.
_STEP = 80
# The family names that TORCH_CUDA_ARCH_LIST may hold.
_NAMES = {"turing": ["7.5"], "ampere": ["8.0", "8.6"], "ada": ["8.9"], "hopper": ["9.0"]}
_NAMES["blackwell"] = ["10.0", "12.0"]


def parse_targets(text: str) -> tuple[str, ...]:
    """``"8.0;9.0a+PTX"``, ``"sm_80 sm_90"`` or ``"Ampere,Hopper+PTX"`` -> targets, sorted.

    Raises:
        UsageError: an entry that is no architecture.
    """
    targets = set()
    for entry in re.split(r"[\s,;]+", text.strip()):
        name, ptx, _ = entry.lower().partition("+ptx")
        for number in _NAMES.get(name, [name]):
            # The kernels use nothing that only 9.0a, and not 9.0, has.
            match = re.fullmatch(r"(sm_|compute_)?(\d{1,2})\.?(\d)[af]?", number)
            if match is None or entry.lower() != name + ptx:
                raise UsageError(
                    f"architecture {entry!r} is unknown: write 9.0, 9.0+PTX or sm_90, several "
                    "with commas"
                )
            kinds = {match[1] or "sm_", *(["compute_"] if ptx else [])}
            targets |= {f"{kind}{match[2]}{match[3]}" for kind in kinds}
    return _sorted(targets)


def native_targets(gpus: Iterable[Capability], known: Iterable[int]) -> tuple[str, ...]:
    """The fewest targets for ``gpus``, but for those too old, of what nvcc knows (90 for 9.0).

    Raises:
        ExtensionError: no GPU is left, or there is no target for one.
    """
    targets = set()
    for gpu in (gpu for gpu in gpus if gpu >= OLDEST):
        wanted = 10 * gpu[0] + gpu[1]
        # The nearest machine code, else the newest PTX, which the driver brings up to date.
        nearest = max((code for code in known if code <= wanted), default=0)
        kind = "sm" if nearest // 10 == gpu[0] else "compute"
        if not covers([f"{kind}_{nearest}"], gpu):
            reason = f"the nvcc at hand cannot compile for compute capability {show(gpu)}"
            raise ExtensionError(reason, "gpu")
        targets.add(f"{kind}_{nearest}")
    if not targets:
        found = ", ".join(map(show, gpus)) or "none"
        reason = f"it needs a GPU of compute capability {show(OLDEST)}, found {found}"
        raise ExtensionError(reason, "gpu")
    return _sorted(targets)


def supported(
    targets: Sequence[str], known: Iterable[int], *, lenient: bool = False
) -> tuple[str, ...]:
    """Those of ``targets`` that nvcc knows and the kernels can run on.

    Args:
        lenient: leave out the others, as long as something is left.

    Raises:
        UsageError: nvcc or the kernels do not support one, or with ``lenient`` any.
    """
    usable = sorted(code for code in known if code >= 10 * OLDEST[0] + OLDEST[1])
    left = tuple(target for target in targets if _number(target) in usable)
    if left != tuple(targets) and not (lenient and left):
        strange = ", ".join(target for target in targets if target not in left)
        raise UsageError(
            f"architecture {strange} is not supported by the kernels, which are for "
            f"{show(OLDEST)} and newer, or by the nvcc at hand, which knows "
            f"{', '.join(f'sm_{code}' for code in usable)}"
        )
    return left


def covers(targets: Iterable[str], gpu: Capability) -> bool:
    """Whether code for ``targets`` runs, and runs the right way, on ``gpu``."""
    wanted = 10 * gpu[0] + gpu[1]
    older = [target for target in targets if _number(target) <= wanted]
    return any(
        _number(target) // 10 == gpu[0]
        if target.startswith("sm_")
        else _number(target) >= _STEP or wanted < _STEP
        for target in older
    )


def show(capability: Capability) -> str:
    """``(9, 0)`` -> ``9.0``."""
    return f"{capability[0]}.{capability[1]}"


def _number(target: str) -> int:
    return int(target.partition("_")[2])


def _sorted(targets: Iterable[str]) -> tuple[str, ...]:
    """Machine code first, then PTX, each from old to new."""
    return tuple(sorted(targets, key=lambda t: (t.startswith("compute_"), _number(t))))
