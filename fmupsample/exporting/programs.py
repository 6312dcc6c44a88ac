"""Recording a part with ``torch.export``."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from fmupsample.errors import UsageError
from fmupsample.exporting.parts import Part

DYNAMIC = ("batch", "size")
# Of PyTorch's own operators, those that runtimes lack or get wrong.
_UNWANTED = ("grid_sampler", "im2col", "col2im", "unfold", "_aa", "linalg")


def record(part: Part, dynamic: Collection[str] = ()) -> ExportedProgram:
    """The part as a graph of PyTorch's own operators.

    Args:
        dynamic: of ``"batch"`` and ``"size"``, what may differ from call to call. Sizes stay
            multiples of the backbone's stride.

    Raises:
        UsageError: this part cannot be recorded so.
    """
    _check_dynamic(part, dynamic)
    # PyTorch takes a size of 1 for one that never changes.
    inputs = part.inputs(2 if "batch" in dynamic else 1, part.size)
    shapes = _dynamic_shapes(part, inputs, dynamic)
    # PyTorch cannot record how NumPy makes constants: now they are made, and kept in caches.
    part.expected(*inputs.values())
    try:
        with torch.no_grad(), quiet():
            program = torch.export.export(
                part.module, tuple(inputs.values()), dynamic_shapes=shapes, strict=False
            )
    except Exception as error:
        if not dynamic:
            raise
        raise UsageError(_refusal(part, dynamic)) from error
    found = _unwanted(program)
    if found:
        raise UsageError(
            f"{_whose(part)} uses {', '.join(found)}, which other runtimes lack; it cannot be "
            "exported"
        )
    return program


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what PyTorch's exporters tell their own developers, which is pages."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        # PyTorch also prints the graph that it gave up on.
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


# What can be recorded for any size. PyTorch looks at others for minutes before it gives up.
_OF_ANY_SIZE = frozenset({"nearest", "bilinear", "jbu", "guided", "sapa", "bilateral-cells"})
_REASSEMBLY_OF_ANY_SIZE = _OF_ANY_SIZE | {"affinity", "resfu"}


def _check_dynamic(part: Part, dynamic: Collection[str]) -> None:
    strange = sorted(set(dynamic) - set(DYNAMIC))
    if strange:
        raise UsageError(f"{strange[0]!r} cannot be dynamic; batch and size can")
    model = getattr(getattr(part.module.module, "backbone", part.module.module), "model", None)
    if "size" in dynamic and getattr(model, "pos_embed", None) is not None:
        raise UsageError(
            f"{_whose(part)} cannot have a dynamic size: the backbone's positional embeddings are "
            "resized at export, for one size; export one file a size, or kernels and reassemble"
        )
    able = _REASSEMBLY_OF_ANY_SIZE if part.name == "reassemble" else _OF_ANY_SIZE
    if "size" in dynamic and part.upsampler and part.upsampler not in able:
        raise UsageError(_refusal(part, dynamic))


def _dynamic_shapes(
    part: Part, inputs: dict[str, Tensor], dynamic: Collection[str]
) -> tuple[tuple[dict[int, Any], ...]] | None:
    if not dynamic:
        return None
    batch, h, w = Dim("batch", min=1), Dim("h", min=2), Dim("w", min=2)
    shapes = []
    for name in inputs:
        shape: dict[int, Any] = {0: batch} if "batch" in dynamic else {}
        if "size" in dynamic:
            cells = name in ("features", "values")
            shape[2] = h if cells else part.stride[0] * h
            shape[3] = w if cells else part.stride[1] * w
        shapes.append(shape)
    return (tuple(shapes),)


def _whose(part: Part) -> str:
    return f"{part.name} of {part.upsampler}" if part.upsampler else part.name


def _refusal(part: Part, dynamic: Collection[str]) -> str:
    return (
        f"{_whose(part)} cannot be exported with dynamic {' and '.join(sorted(dynamic))}: its "
        "computation is arranged for given sizes; leave --dynamic out, and export one file a size"
    )


def _unwanted(program: ExportedProgram) -> list[str]:
    """Names of operators that the graph should not have."""
    names = {
        str(node.target)
        for node in program.graph.nodes
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    }
    return sorted(
        name
        for name in names
        if name.split(".")[0] != "aten" or any(word in name for word in _UNWANTED)
    )
