"""AnyUp, JAFAR and NAF: the authors' code beside ours, on one machine in one run.

    git clone https://github.com/wimmerth/anyup /tmp/anyup
    git clone https://github.com/PaulCouairon/JAFAR /tmp/JAFAR
    git clone https://github.com/valeoai/NAF /tmp/NAF
    python research/benchmarks/peers.py --anyup /tmp/anyup --jafar /tmp/JAFAR --naf /tmp/NAF

Their code runs as published, with random weights, from checkouts outside this repository; JAFAR and
NAF need the package einops. NAF's attention is NATTEN's, whose kernels need an NVIDIA GPU: on a CPU
a plain PyTorch stand-in takes their place, and its row says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import types
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cases import Setting, Workload
from common import options, parse_options, tell_faults
from fmupsample.bench.measuring import Apart, Case, Here, time_cases
from fmupsample.device import resolve_device
from fmupsample.upsamplers.registry import METHODS
from reports import Report


def own(setting: Setting, device: torch.device, name: str) -> Case:
    return Workload(setting, device).case(name)


def here(setting: Setting, device: torch.device, method: str) -> Case:
    """Our module of a peer's method."""
    torch.manual_seed(0)
    row = METHODS[method]
    model = row.build(row.options(setting.channels)).eval().requires_grad_(False).to(device)
    work = Workload(setting, device)
    return partial(model, work.x, work.image)


def anyup(setting: Setting, device: torch.device, checkout: Path, chunk: int | None) -> Case:
    """AnyUp's default model; ``chunk`` queries at once, its own option for saving memory."""
    sys.path.insert(0, str(checkout))
    from anyup.model import AnyUp

    work = Workload(setting, device)
    model, x, image = AnyUp().eval().to(device), work.x, work.image
    return torch.no_grad()(lambda: model(image, x, q_chunk_size=chunk))


def jafar(setting: Setting, device: torch.device, checkout: Path) -> Case:
    """JAFAR's default model."""
    module = _module(checkout, "src/upsampler/jafar.py")
    # Its coordinates are made on a GPU unless told otherwise.
    module.create_coordinate = partial(module.create_coordinate, device=device)
    work = Workload(setting, device)
    model = module.JAFAR(v_dim=setting.channels).eval().to(device)
    x, image = work.x, work.image
    return torch.no_grad()(lambda: model(image, x, (setting.size,) * 2))


def naf(setting: Setting, device: torch.device, checkout: Path) -> Case:
    """NAF's default model; on a CPU with :func:`neighbourhood_attention`."""
    if device.type != "cuda":
        # On a GPU a missing NATTEN is an error that says so: there a stand-in would be unfair.
        stand_in = types.ModuleType("natten")
        stand_in.na2d = neighbourhood_attention
        sys.modules["natten"] = stand_in
    work = Workload(setting, device)
    model, x, image = _module(checkout, "src/model/naf.py").NAF().eval(), work.x, work.image
    model.to(device)
    return torch.no_grad()(lambda: model(image, x, (setting.size,) * 2))


def _module(checkout: Path, path: str) -> types.ModuleType:
    """A file of a checkout. The package around it imports every model it was compared with."""
    sys.path.insert(0, str(checkout))
    spec = importlib.util.spec_from_file_location(Path(path).stem, checkout / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def neighbourhood_attention(
    q: Tensor,  # [B, H, W, heads, D]
    k: Tensor,
    v: Tensor,  # [B, H, W, heads, V]
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    **_: object,
) -> Tensor:
    """What ``natten.na2d`` computes, as masked dense attention: ``[B, H, W, heads, V]``.

    Pixels of one remainder modulo the dilation attend to one another only, within a window that is
    moved inside at the borders. Dense attention computes more than is kept; the windows hold a
    tenth of the keys at 448 px, a third at 224 px.
    """
    dy, dx = dilation
    rows, columns = q.shape[1] // dy, q.shape[2] // dx
    if (rows * dy, columns * dx) != tuple(q.shape[1:3]):
        raise ValueError("the stand-in needs a size that is a multiple of the dilation")
    mask_y = _window(rows, kernel_size[0])
    mask_x = _window(columns, kernel_size[1])
    mask = mask_y[:, None, :, None] & mask_x[None, :, None, :]
    mask = mask.reshape(rows * columns, rows * columns).to(q.device)

    def groups(t: Tensor, y: int) -> Tensor:  # [B, dx, heads, rows * columns, D]
        t = t[:, y::dy].unflatten(2, (columns, dx))
        return t.permute(0, 3, 4, 1, 2, 5).flatten(3, 4)

    out = q.new_empty(*q.shape[:4], v.shape[4])
    for y in range(dy):
        part = F.scaled_dot_product_attention(
            groups(q, y), groups(k, y), groups(v, y), attn_mask=mask
        )
        part = part.unflatten(3, (rows, columns)).permute(0, 3, 4, 1, 2, 5)
        out[:, y::dy] = part.flatten(2, 3)
    return out


def _window(cells: int, kernel: int) -> Tensor:
    """``[cells, cells]``: whether a query (row) attends to a key (column) along one axis."""
    start = (torch.arange(cells) - kernel // 2).clamp(0, max(0, cells - kernel))[:, None]
    keys = torch.arange(cells)
    return (keys >= start) & (keys < start + kernel)


def _wanted(args: argparse.Namespace, setting: Setting, device: torch.device) -> dict[str, tuple]:
    """What prepares each case, with its arguments."""
    ours = {
        "ReSFU, whole head": "whole head fp32",
        "F.interpolate": "bilinear fp32",
        "backbone": "backbone fp32",
    }
    wanted: dict[str, tuple] = {n: (own, setting, device, c) for n, c in ours.items()}
    if args.anyup:
        chunk = f", {args.anyup_chunk} queries at once" if args.anyup_chunk else ""
        wanted[f"AnyUp{chunk}"] = (anyup, setting, device, args.anyup, args.anyup_chunk)
    if args.jafar:
        wanted["JAFAR"] = (jafar, setting, device, args.jafar)
    if args.naf:
        name = "NAF" if device.type == "cuda" else "NAF, plain PyTorch for NATTEN"
        wanted[name] = (naf, setting, device, args.naf)
    for method in ("anyup", "jafar", "naf"):
        if getattr(args, method):
            wanted[f"{METHODS[method].title}, here"] = (here, setting, device, method)
    return wanted


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__)
    add = parser.add_argument
    add("--anyup", type=Path, metavar="DIR", help="a checkout of github.com/wimmerth/anyup")
    add("--jafar", type=Path, metavar="DIR", help="a checkout of github.com/PaulCouairon/JAFAR")
    add("--naf", type=Path, metavar="DIR", help="a checkout of github.com/valeoai/NAF")
    add("--anyup-chunk", type=int, metavar="N", help="AnyUp's q_chunk_size (default: none)")
    add("--size", type=int, default=224)
    add("--channels", type=int, default=384)
    add("--ratio", type=int, default=14)
    add("--rounds", type=int, default=3)
    add("--device", default="auto")
    args = parse_options(parser, arguments)
    device = resolve_device(args.device)
    report = Report(args.output, device)
    setting = Setting(args.size, args.channels, args.ratio)
    wanted = _wanted(args, setting, device)
    with ExitStack() as stack:
        runners: dict[str, Here | Apart] = {}
        for name, (prepare, *rest) in wanted.items():
            if device.type == "cuda":
                runners[name] = Here(prepare(*rest), device)
            else:
                runners[name] = stack.enter_context(Apart(prepare, *rest))
        rows, skipped = time_cases(runners, args.rounds, peaks=lambda _: True)
    base = rows["ReSFU, whole head"]["median_s"]
    result = report.add(asdict(setting), cases=rows, skipped=skipped)
    report.write()
    print(f"{setting}, {device.type}, {result['backend']}, fp32")
    for name, row in rows.items():
        low, high = row["quartiles_s"]
        print(
            f"{name:32s} {1e3 * row['median_s']:11.1f} ms  ({1e3 * low:.1f} .. {1e3 * high:.1f}, "
            f"{row['rounds']} rounds)  {row['median_s'] / base:8.2f} x ReSFU  "
            f"{row['peak_bytes'] / 1e6:8.0f} MB"
        )
    for name, reason in skipped.items():
        print(f"{name}: {reason}")


if __name__ == "__main__":
    tell_faults(main)
