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
_ENTRY = re.compile(r"(?:sm_|compute_)?(\d{1,2})\.?(\d)([af]?)")


def parse_targets(text: str) -> tuple[str, ...]:
    """``"8.0;9.0+PTX"``, ``"sm_80 sm_90"`` or ``"Ampere,Hopper+PTX"`` -> targets, sorted.

    Raises:
        UsageError: an entry that is no architecture.
    """
    targets = set()
    for entry in re.split(r"[\s,;]+", text.strip()):
        name = entry.lower().removesuffix("+ptx")
        for number in _NAMES.get(name, [name]):
            match = _ENTRY.fullmatch(number)
            if match is None:
                raise UsageError(
                    f"architecture {entry!r} is unknown: write 9.0, 9.0+PTX or sm_90, several "
                    "with commas"
                )
            digits = "".join(match.groups())
            if not number.startswith("compute_"):
                targets.add(f"sm_{digits}")
            if number.startswith("compute_") or name != entry.lower():
                targets.add(f"compute_{digits}")
    return _sorted(targets)


def covers(targets: Iterable[str], capability: Capability) -> bool:
    """Whether code for ``targets`` runs, and runs the right way, on a GPU of ``capability``."""
    wanted = 10 * capability[0] + capability[1]
    for target in targets:
        kind, value, suffix = _split(target)
        if kind == "sm":
            same_major = value // 10 == wanted // 10 and value <= wanted and suffix != "a"
            if value == wanted or same_major:
                return True
        elif not suffix and value <= wanted and (value >= _STEP or wanted < _STEP):
            return True
    return False


def targets_for(gpus: Sequence[Capability], known: Sequence[str]) -> tuple[str, ...]:
    """The fewest of the targets that nvcc knows that serve ``gpus``, without those too old.

    Raises:
        ExtensionError: there is none for one of the GPUs, or no GPU is left.
    """
    young = [gpu for gpu in gpus if gpu >= OLDEST]
    if not young:
        found = ", ".join(map(show, gpus)) or "none"
        reason = f"it needs a GPU of compute capability {show(OLDEST)}, found {found}"
        raise ExtensionError(reason, "gpu")
    targets = set()
    for gpu in young:
        # The nearest machine code, else the newest PTX, which the driver brings up to date.
        wanted = [t for t in known if not _split(t)[2] and covers([t], gpu)]
        if not wanted:
            reason = f"the nvcc at hand cannot compile for compute capability {show(gpu)}"
            raise ExtensionError(reason, "gpu")
        targets.add(max(wanted, key=lambda t: (t.startswith("sm_"), _split(t)[1])))
    return _sorted(targets)


def only_known(targets: Iterable[str], known: Sequence[str]) -> tuple[str, ...]:
    """Those of ``targets`` that nvcc knows and the kernels can run on."""
    oldest = 10 * OLDEST[0] + OLDEST[1]
    return tuple(t for t in targets if t in known and _split(t)[1] >= oldest)


def show(capability: Capability) -> str:
    """``(9, 0)`` -> ``9.0``."""
    return f"{capability[0]}.{capability[1]}"


def _split(target: str) -> tuple[str, int, str]:
    """``sm_90a`` -> ``("sm", 90, "a")``."""
    kind, _, rest = target.partition("_")
    digits = rest.rstrip("af")
    return kind, int(digits), rest[len(digits) :]


def _sorted(targets: Iterable[str]) -> tuple[str, ...]:
    """Machine code first, then PTX, each from old to new."""
    return tuple(sorted(set(targets), key=lambda t: (not t.startswith("sm_"), _split(t)[1:])))
