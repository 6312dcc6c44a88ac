"""What an ONNX graph holds, and its form in an older opset."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fmupsample.errors import UsageError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_UNWANTED = ("GridSample", "Col2Im")
# In opset 18 their axes are an input, in 17 an attribute.
_REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSumSquare",
)  # fmt: skip


def check_graph(model: ModelProto) -> None:
    """Raise a UsageError unless all nodes are of ONNX's own domain, and wanted."""
    import onnx

    strange = {
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        for node in model.graph.node
        if node.domain not in ("", "ai.onnx") or node.op_type in _UNWANTED
    }
    if strange or model.functions:
        names = sorted(strange | {function.name for function in model.functions})
        raise UsageError(f"the ONNX graph would hold {', '.join(names)}, which runtimes lack")
    onnx.checker.check_model(model)


def to_opset_17(model: ModelProto) -> None:
    """Rewrite a model of opset 18 in place.

    ONNX's own converter knows neither ``Pad`` nor axes that are nodes.
    """
    import onnx
    from onnx import numpy_helper

    constants = {c.name: numpy_helper.to_array(c) for c in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    for node in model.graph.node:
        if node.op_type in _REDUCTIONS:
            _axes_as_attribute(node, constants)
        elif node.op_type == "Split":
            _without(node, "num_outputs")
        elif node.op_type == "Resize":
            _without(node, "antialias", "axes", "keep_aspect_ratio_policy")
    for imported in model.opset_import:
        if imported.domain in ("", "ai.onnx"):
            imported.version = 17
    model.ir_version = min(model.ir_version, onnx.IR_VERSION_2023_5_5 - 1)


def _axes_as_attribute(node: NodeProto, constants: dict[str, np.ndarray]) -> None:
    from onnx import helper

    if len(node.input) < 2:
        return
    axes = constants[node.input[1]]
    del node.input[1]
    _without(node, "noop_with_empty_axes")
    node.attribute.append(helper.make_attribute("axes", [int(axis) for axis in axes.flat]))


def _without(node: NodeProto, *names: str) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name not in names]
    del node.attribute[:]
    node.attribute.extend(kept)
