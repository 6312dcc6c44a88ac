"""Which implementation computes the operators on a device.

``"auto"``: the compiled CUDA extension for tensors on a CUDA device, if it can be had, else plain
PyTorch on the same device, with one warning that says why. ``"cuda"``: the extension or an error.
``"torch"``: plain PyTorch. Chosen once per device; afterwards asking is one look into a dictionary.
"""

from __future__ import annotations

import os
import threading
import warnings
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from fmupsample.errors import ExtensionError, UsageError
from fmupsample.ops import plain

if TYPE_CHECKING:
    from fmupsample.ops.building.compiling import Progress

BACKENDS = ("auto", "cuda", "torch")
VARIABLE = "FMUPSAMPLE_BACKEND"


@dataclass(frozen=True)
class Choice:
    """What computes on a device.

    Attributes:
        name: ``"cuda"`` (the extension) or ``"torch"`` (plain PyTorch).
        module: has ``reassemble``, ``grad_value`` and ``grad_weights``.
        reason: why it is plain PyTorch on a device that the extension is made for.
    """

    name: str
    module: ModuleType
    reason: str | None = None


PLAIN = Choice("torch", plain)
_lock = threading.RLock()
_backend: str | None = None  # as set; None: as the environment says
_choices: dict[torch.device, Choice] = {}
_warned = False


def get_backend() -> str:
    """The backend in force: as set, else ``$FMUPSAMPLE_BACKEND``, else ``"auto"``.

    Raises:
        UsageError: the environment names an unknown one.
    """
    return _backend or _checked(os.environ.get(VARIABLE) or "auto", f"{VARIABLE}=")


def set_backend(name: str | None) -> None:
    """Choose for the whole process: one of :data:`BACKENDS`; ``None``: what the environment says.

    Raises:
        UsageError: ``name`` is unknown.
    """
    global _backend, _choices
    name = name if name is None else _checked(name)
    with _lock:
        _backend, _choices = name, {}


def implementation(device: torch.device) -> ModuleType:
    """The module with ``reassemble``, ``grad_value`` and ``grad_weights`` for ``device``.

    The first call for a CUDA device may compile the extension, see :func:`prepare`.

    Raises:
        UsageError, ExtensionError: as :func:`prepare`.
    """
    choice = _choices.get(device)
    if choice is None:
        choice = prepare(device)
        if choice.reason is not None:
            _warn_once(f"plain PyTorch is used on {device}: {choice.reason}")
    return choice.module


def compiled(device: torch.device) -> bool:
    """Whether the compiled extension computes on ``device``. May compile it."""
    implementation(device)
    return prepare(device).name == "cuda"


def check_backend(device: torch.device) -> None:
    """Raise a UsageError if the backend in force can never work on ``device``; costs nothing."""
    if get_backend() == "cuda" and device.type != "cuda":
        raise UsageError(
            f"backend cuda needs a CUDA device, and this is {device.type}; use --backend auto, "
            "or --device cuda"
        )


def prepare(device: torch.device, progress: Progress | None = None) -> Choice:
    """Choose for ``device`` now, and not at the first operator; gives no warning.

    Compiles the extension if it is wanted, needed and not there.

    Args:
        progress: is told what takes long, and for how many seconds.

    Raises:
        UsageError: an unknown backend, or ``"cuda"`` for a device that is none.
        ExtensionError: the backend is ``"cuda"`` and the extension cannot be had.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    with _lock:
        choice = _choices.get(device)
        if choice is None:
            choice = _choices[device] = _choose(device, progress)
    return choice


def _choose(device: torch.device, progress: Progress | None) -> Choice:
    backend = get_backend()
    check_backend(device)
    if backend == "torch" or device.type != "cuda":
        return PLAIN
    try:
        return Choice("cuda", _compiled_module(device, progress))
    except ExtensionError as error:
        reason = f"the CUDA extension is not available: {error}"
        if backend == "cuda":
            raise ExtensionError(reason, error.kind, error.log) from error
        return Choice("torch", plain, reason)


def _compiled_module(device: torch.device, progress: Progress | None) -> ModuleType:
    """Load the extension and give the module that calls it."""
    # Not at the top: who computes on a CPU has no use for them.
    from fmupsample.ops.building.architectures import OLDEST, covers, show
    from fmupsample.ops.building.extension import EXTENSION

    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        raise ExtensionError(
            f"{device} has compute capability {show(capability)}, it needs {show(OLDEST)}", "gpu"
        )
    library = EXTENSION.load(progress)
    if not covers(library.targets, capability):
        raise ExtensionError(f"{library.path} was not compiled for {show(capability)}", "gpu")
    return import_module("fmupsample.ops.cuda")


def _checked(name: str, where: str = "backend ") -> str:
    if name not in BACKENDS:
        raise UsageError(f"{where}{name!r} is unknown: use {', '.join(BACKENDS)}")
    return name


def _warn_once(message: str) -> None:
    global _warned
    with _lock:
        if _warned:
            return
        _warned = True
    warnings.warn(message, RuntimeWarning, stacklevel=4)
