"""How far from exact: ours and plain PyTorch at one dtype, both against float64."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from cases import DTYPES, TESTS, Setting, literal_head
from fmupsample.ops import backend, plain, reassemble
from fmupsample.upsamplers import ReSFU, ReSFUConfig

# Small enough for the definition, large enough for borders and several tiles.
SETTING = Setting(size=112, channels=64, ratio=14, batch=2)
PARTS = ("reassembly", "value gradient", "weights gradient")


def measure_errors(dtype: str, device: torch.device) -> dict[str, dict[str, float]]:
    """Largest absolute errors, ``{part: {"ours", "definition", "tiles"}}``.

    ``definition`` is the literal form evaluated in ``dtype``, ``tiles`` our own plain PyTorch
    implementation, where another one is in use. The exact result is the definition's in float64,
    from the same rounded inputs.
    """
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    from reference.reassembly import reassemble as literal

    s, kind = SETTING, DTYPES[dtype]
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(s.batch, s.channels, s.cells, s.cells, generator=generator).to(kind)
    weights = torch.randn(s.batch, 9, s.size, s.size, generator=generator).softmax(1)
    grad = torch.randn(s.batch, s.channels, s.size, s.size, generator=generator).to(kind)

    def results(function: Callable[..., Tensor], to: Callable[[Tensor], Tensor], w: Tensor) -> dict:
        v, w = to(value).requires_grad_(), to(w).requires_grad_()
        out = function(v, w)
        gradients = torch.autograd.grad(out, (v, w), to(grad).to(out.dtype))
        found = zip(PARTS, (out, *gradients), strict=True)
        return {name: tensor.detach().cpu().double() for name, tensor in found}

    def tiles() -> dict:
        v, w, g = (t.to(device) for t in (value, weights, grad))
        made = (
            plain.reassemble(v, w, True),
            plain.grad_value(g, w, s.cells, s.cells, True),
            plain.grad_weights(g, v, 3, True),
        )
        return {name: t.cpu().double() for name, t in zip(PARTS, made, strict=True)}

    exact = results(lambda v, w: literal(v, w, True), lambda t: t.double(), weights)
    found = {
        "ours": results(reassemble, lambda t: t.to(device, copy=True), weights),
        "definition": results(
            lambda v, w: literal(v, w, True), lambda t: t.to(kind, copy=True), weights
        ),
    }
    if backend.prepare(device).name != "torch":
        found["tiles"] = tiles()

    heads = _heads(kind, device)
    exact["whole head"] = heads.pop("exact")
    for who, result in heads.items():
        found.setdefault(who, {})["whole head"] = result
    return {
        part: {
            who: (result[part] - exact[part]).abs().max().item()
            for who, result in found.items()
            if part in result
        }
        for part in exact
    }


@torch.no_grad()
def _heads(kind: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    s = SETTING
    torch.manual_seed(1)
    head = ReSFU(ReSFUConfig(channels=s.channels)).eval()
    x = torch.randn(s.batch, s.channels, s.cells, s.cells).to(kind)
    image = torch.randn(s.batch, 3, s.size, s.size)
    cpu = torch.device("cpu")
    exact = literal_head(head.double(), cpu)(x.double(), image.double())
    head = head.float()
    made = {"exact": exact, "definition": literal_head(head, cpu)(x, image.to(kind))}
    head = head.to(device)
    made["ours"] = head(x.to(device), image.to(device))
    if backend.prepare(device).name != "torch":
        before = backend.get_backend()
        backend.set_backend("torch")
        try:
            made["tiles"] = head(x.to(device), image.to(device))
        finally:
            backend.set_backend(before)
    return {who: result.cpu().double() for who, result in made.items()}


def worst_ratio(errors: dict[str, dict[str, float]]) -> float:
    """The largest of our errors over plain PyTorch's, over all parts.

    Plain PyTorch is ours where another implementation is in use, else the definition.
    """
    return max(
        part["ours"] / max(part.get("tiles", part["definition"]), 1e-300)
        for part in errors.values()
    )
