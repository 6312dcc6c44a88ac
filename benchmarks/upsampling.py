"""How long upsampling takes, against a literal evaluation, bilinear, and the backbone itself.

    python benchmarks/upsampling.py -o benchmarks/results/upsampling-cpu.json

Everything is timed in one run on one machine, interleaved, so that the ratios mean something even
where the absolute times vary. Median and quartiles over the repetitions.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

from fmupsample._version import __version__
from fmupsample.device import resolve_device
from fmupsample.ops import reassemble
from fmupsample.upsamplers import Bilinear, JointBilateral, ReSFU, ReSFUConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def machine(device: torch.device) -> dict:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "fmupsample": __version__,
    }


def measure(cases: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict:
    """Median, quartiles (seconds) and, on a GPU, peak memory (bytes) per case, interleaved."""

    def once(case: Callable[[], object]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        case()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    times: dict[str, list[float]] = {name: [] for name in cases}
    peaks = {}
    for name, case in cases.items():  # warm-up
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        once(case)
        if device.type == "cuda":
            peaks[name] = torch.cuda.max_memory_allocated() - before
    for _ in range(rounds):
        for name, case in cases.items():
            times[name].append(once(case))
    result = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        result[name] = {"median": median, "quartiles": [low, high]}
        if name in peaks:
            result[name]["peak_bytes"] = peaks[name]
    return result


def peak_memory(size: int, channels: int, patch: int) -> dict[str, int]:
    """Bytes that the whole head adds to a process at its peak, and its output's share of them.

    In a fresh process that has run the head once on a small picture, so that what is loaded, and
    the pools of the libraries, do not count. Linux only.
    """
    job = f"""
import torch
from pathlib import Path
from fmupsample.upsamplers import ReSFU, ReSFUConfig
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith("VmHWM"))
torch.set_num_threads({torch.get_num_threads()})
head = ReSFU(ReSFUConfig(channels={channels})).eval().requires_grad_(False)
make = lambda n: (torch.randn(1, {channels}, n // {patch}, n // {patch}), torch.randn(1, 3, n, n))
head(*make({4 * patch}))
inputs = make({size})
Path("/proc/self/clear_refs").write_text("5")
before = peak()
out = head(*inputs)
print(peak() - before, out.numel() * out.element_size())
"""
    done = subprocess.run([sys.executable, "-c", job], capture_output=True, text=True, check=True)
    peak, output = (int(word) for word in done.stdout.split())
    return {"peak_bytes": peak, "output_bytes": output}


def literal_resfu(head: ReSFU) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The definition, with the parameters of ``head``, in the dtype of its inputs."""
    from reference.resfu import resfu

    names = {
        "feature_norm": "norm_x",
        "guidance_norm": "norm_y",
        "query": "q",
        "key": "k",
    }
    pcdc = {
        "difference": "",
        "mix": "channel_compressor.1.",
        "mix_norm": "channel_compressor.3.",
        "score": "channel_compressor.4.",
        "norm": "norm.",
    }
    state = {}
    for name, tensor in head.state_dict().items():
        first, *rest = name.split(".")
        if first in names:
            state[".".join([names[first], *rest])] = tensor
        elif first.endswith("_scores"):
            renamed = f"{first}.{pcdc[rest[0]]}{rest[1]}"
            if renamed.endswith("_scores.bias"):
                tensor = tensor.reshape(1, -1, 1, 1)
            state[renamed] = tensor
    return lambda x, image: resfu(state, x, head.stem(image), head.config.groups)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=448, help="pixels of the square picture")
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-literal", action="store_true", help="skip the slow literal form")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    device = resolve_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)

    torch.manual_seed(0)
    size = (args.size, args.size)
    model = timm.create_model(args.backbone, num_classes=0, dynamic_img_size=True).eval()
    patch, channels = model.patch_embed.patch_size[0], model.num_features
    model = model.to(device)
    head = ReSFU(ReSFUConfig(channels=channels)).eval().to(device)
    image = torch.randn(1, 3, *size, device=device)
    x = torch.randn(1, channels, size[0] // patch, size[1] // patch, device=device)
    x_last = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        weights = head.kernels(x, image)
        jbu, bilinear = JointBilateral(), Bilinear()
        classifier = torch.randn(21, channels, 1, 1, device=device)

        def backbone_bf16() -> torch.Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                return model.forward_features(image)

        def masks() -> torch.Tensor:
            return head.reassemble(head.kernels(x, image), F.conv2d(x, classifier))

        cases: dict[str, Callable[[], object]] = {
            "backbone forward, fp32": lambda: model.forward_features(image),
            "backbone forward, bf16": backbone_bf16,
            "bilinear": lambda: bilinear(x, size=size),
            "jbu": lambda: jbu(x, image),
            "resfu, kernel weights": lambda: head.kernels(x, image),
            "resfu, reassembly": lambda: reassemble(x, weights),
            "resfu, reassembly, channels-last": lambda: reassemble(x_last, weights),
            "resfu, whole": lambda: head(x, image),
            "resfu, whole, bf16 features": lambda: head(x.bfloat16(), image),
            "resfu, 21 masks (value first)": masks,
            "guidance stem": lambda: head.stem(image),
        }
        result = measure(cases, args.rounds, device)
        error = None
        if not args.no_literal:
            literal = literal_resfu(head)
            result |= measure({"resfu, literal": lambda: literal(x, image)}, 2, device)
            error = (literal(x, image) - head(x, image)).abs().max().item()

    base = result["backbone forward, fp32"]["median"]
    print(f"{args.backbone}, {args.size} px, C = {channels}, ratio {patch}, {device}")
    for name, row in result.items():
        low, high = row["quartiles"]
        print(
            f"{name:32s} {1e3 * row['median']:9.2f} ms  ({1e3 * low:.2f} .. {1e3 * high:.2f})  "
            f"{row['median'] / base:7.3f} x backbone"
        )
    if error is not None:
        print(f"largest difference from the literal form: {error:.2e}")
    memory = None
    if device.type == "cpu" and sys.platform == "linux":
        memory = peak_memory(args.size, channels, patch)
        print(
            "memory of the head: output {output_bytes:,} bytes, peak {peak_bytes:,}".format(
                **memory
            )
        )
    report = {
        "machine": machine(device),
        "setting": {"size": args.size, "channels": channels, "ratio": patch},
        "seconds": result,
        "difference_from_literal": error,
        "head_memory": memory,
        "peak_process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
