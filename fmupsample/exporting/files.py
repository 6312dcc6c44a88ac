"""Exported files: written whole or not at all, run, and compared with the library itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fmupsample.atomic import replacing
from fmupsample.errors import OutputError, UsageError
from fmupsample.exporting.onnx_graph import check_graph, to_opset_17
from fmupsample.exporting.parts import Part
from fmupsample.exporting.programs import quiet, record

TOLERANCE = 1e-3  # of the range of the result
OPSETS = (17, 18)
_LARGEST_ONNX = 2 << 30  # bytes, of a file of protocol buffers


class Format(StrEnum):
    """Kinds of files."""

    onnx = "onnx"
    pt2 = "pt2"


@dataclass(frozen=True)
class Exported:
    """A file that was written and gives the right numbers.

    Attributes:
        path: the file.
        difference: the largest from the library's own result, relative to that one's range.
        shapes: of inputs and result, as recorded.
    """

    path: Path
    difference: float
    shapes: dict[str, list[int]]

    @property
    def script(self) -> Path:
        """The script that stands beside it in a folder."""
        return self.path.with_name(f"use_{self.path.stem}_{self.path.suffix[1:]}.py")


def export_part(
    part: Part,
    path: Path,
    kind: Format = Format.onnx,
    *,
    opset: int = 18,
    dynamic: Collection[str] = (),
) -> Exported:
    """Write ``part`` to ``path``, unless its results differ from the library's.

    Args:
        opset: of ONNX, 17 or 18.
        dynamic: see :func:`~fmupsample.exporting.programs.record`.

    Raises:
        UsageError: it cannot be exported so, or packages are missing.
        OutputError: the file gives other numbers; it is not kept.
    """
    if kind is Format.onnx:
        require_onnx()
    if opset not in OPSETS:
        raise UsageError(f"opset {opset} is not offered; {' and '.join(map(str, OPSETS))} are")
    program = record(part, dynamic)
    with replacing(path, f".{kind}") as temporary:
        if kind is Format.onnx:
            _write_onnx(program, part, temporary, opset, dynamic)
        else:
            with quiet():
                torch.export.save(program, temporary)
        difference = _difference(part, temporary, kind, dynamic)
        if not difference <= TOLERANCE:
            raise OutputError(
                f"{path.name} differs from the library's own result by {difference:.2g} of its "
                f"range, more than {TOLERANCE}; it was not kept"
            )
    inputs = part.inputs(1, part.size)
    shapes = {name: list(tensor.shape) for name, tensor in inputs.items()}
    shapes[part.output] = list(part.expected(*inputs.values()).shape)
    return Exported(path, difference, shapes)


def require_onnx() -> None:
    """Raise a UsageError unless what ONNX needs is installed."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"ONNX files need {', '.join(missing)}: pip install 'fmupsample[export]'; "
            "--format pt2 needs nothing more"
        )


def _write_onnx(
    program: ExportedProgram, part: Part, path: Path, opset: int, dynamic: Collection[str]
) -> None:
    import onnx

    size = sum(t.nbytes for t in (*program.state_dict.values(), *program.constants.values()))
    if size > _LARGEST_ONNX:
        raise UsageError(
            f"{part.name} has {size / 1e9:.1f} GB of weights, more than an ONNX file holds; "
            "--format pt2 has no such limit"
        )
    with quiet():
        written = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=18,
            input_names=list(part.inputs(1, part.size)),
            output_names=[part.output],
            verbose=False,
        )
    model = written.model_proto
    if opset == 17:
        to_opset_17(model)
    check_graph(model)
    onnx.save_model(model, path)


def _difference(part: Part, path: Path, kind: Format, dynamic: Collection[str]) -> float:
    """The largest of all sizes tried, relative to the range of what is right."""
    run = _onnx_runner(path) if kind is Format.onnx else _pt2_runner(path)
    largest = 0.0
    for batch, size in _cases(part, dynamic):
        inputs = part.inputs(batch, size)
        right, found = part.expected(*inputs.values()), run(inputs)
        spread = float(right.max() - right.min()) or 1.0
        difference = float((found - right).abs().max()) / spread
        if not difference <= largest:  # a NaN stays
            largest = difference
    return largest


def _cases(part: Part, dynamic: Collection[str]) -> Iterator[tuple[int, tuple[int, int]]]:
    """Batches and sizes to compare at; of what is dynamic, another one too."""
    yield 1, part.size
    if dynamic:
        height, width = part.size
        other = (height + part.stride[0], max(2, width // part.stride[1] - 1) * part.stride[1])
        yield 3 if "batch" in dynamic else 1, other if "size" in dynamic else part.size


def _onnx_runner(path: Path) -> Callable[[dict[str, Tensor]], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Tensor]) -> Tensor:
        return torch.from_numpy(session.run(None, {k: v.numpy() for k, v in inputs.items()})[0])

    return run


def _pt2_runner(path: Path) -> Callable[[dict[str, Tensor]], Tensor]:
    with quiet():
        module = torch.export.load(path).module()
    return torch.no_grad()(lambda inputs: module(*inputs.values()))
