"""The short script beside an exported file: how to call it."""

from __future__ import annotations

from fmupsample.backbones import Backbone
from fmupsample.exporting.parts import Part

_IMAGE = """\
pixels = Image.open(sys.argv[1]).convert("RGB").resize(({width}, {height}))
pixels = (np.asarray(pixels) / 255.0 - {mean}) / {std}
inputs = {{"image": pixels.transpose(2, 0, 1)[None].astype(np.float32)}}
"""
_ONNX = """\
session = onnxruntime.InferenceSession(Path(__file__).with_name("{file}"))
{output} = session.run(None, inputs)[0]
"""
_PT2 = """\
module = torch.export.load(Path(__file__).with_name("{file}")).module()
{output} = module(*map(torch.from_numpy, inputs.values()))
"""


def script(part: Part, file: str, shapes: dict[str, list[int]], backbone: Backbone) -> str:
    """Python that calls ``file``, on an image where it takes one, and prints the result's shape.

    Args:
        shapes: of inputs and result, by name.
    """
    onnx, pictured = file.endswith(".onnx"), "image" in shapes
    lines = [f'"""{_doc(part, file, shapes)}"""']
    lines += ["import sys"] * pictured
    lines += ["from pathlib import Path", "", "import numpy as np"]
    lines += ["import onnxruntime" if onnx else "import torch"]
    lines += ["from PIL import Image"] * pictured
    text = "\n".join(lines) + "\n\n"
    given = [name for name in shapes if name not in ("image", part.output)]
    if pictured:
        height, width = shapes["image"][2:]
        text += _IMAGE.format(
            height=height, width=width, mean=list(backbone.mean), std=list(backbone.std)
        )
    else:
        text += "inputs = {}\n"
    for name in given:
        text += f'inputs["{name}"] = np.zeros({tuple(shapes[name])}, np.float32)  # yours here\n'
    text += (_ONNX if onnx else _PT2).format(file=file, output=part.output)
    return text + f"print({part.output}.shape)\n"


def _doc(part: Part, file: str, shapes: dict[str, list[int]]) -> str:
    takes = ", ".join(f"{name} {shapes[name]}" for name in shapes if name != part.output)
    call = f"use_{file.replace('.', '_')}.py" + (" image.jpg" if "image" in shapes else "")
    return f"{takes} -> {part.output} {shapes[part.output]}: python {call}"
