"""``fmupsample doctor``: what is installed, what works, what to do about the rest."""

from __future__ import annotations

import json
import os
import platform
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fmupsample._version import __version__
from fmupsample.errors import FmupsampleError
from fmupsample.wording import human_bytes
from fmupsample_cli.options import Json
from fmupsample_cli.report import print_json, print_table

if TYPE_CHECKING:
    from fmupsample.ops.building.extension import Extension

PACKAGES = ("torch", "timm", "safetensors", "huggingface_hub", "numpy", "pillow", "opencv")
# The one whose distribution is named otherwise.
_DISTRIBUTIONS = {"opencv": "opencv-python-headless"}

OK, NOTE, BAD = "ok", "note", "BROKEN"
_EXTENSION = "CUDA extension"


def doctor(as_json: Json = False) -> None:
    """Check the installation: versions, devices, the CUDA extension, caches, weights, a tiny run.

    Exit code 1 if something that is shipped is broken; everything else is only noted.
    """
    checks = [*_versions(), *_devices(), *_extension(), *_caches(), *_weights()]
    broken = [check for check in checks if check["state"] == BAD]
    if as_json:
        print_json({"ok": not broken, "checks": checks})
    else:
        print_table(["", "what", "found"], [[c["state"], c["what"], c["found"]] for c in checks])
        print("something shipped is broken: reinstall fmupsample" if broken else "all is well")
    if broken:
        raise typer.Exit(1)


def _check(what: str, found: str, state: str = OK) -> dict[str, Any]:
    return {"what": what, "found": found, "state": state}


def _versions() -> list[dict[str, Any]]:
    rows = [
        _check("fmupsample", __version__),
        _check("python", f"{platform.python_version()} on {platform.platform(terse=True)}"),
    ]
    for name in PACKAGES:
        try:
            rows.append(_check(name, version(_DISTRIBUTIONS.get(name, name))))
        except PackageNotFoundError:
            # OpenCV may come from another distribution; then the version is not known.
            rows.append(_check(name, "not installed under this name", NOTE))
    return rows


def _devices() -> list[dict[str, Any]]:
    import torch

    def supported(name: str) -> bool:
        return bool(getattr(torch.cpu, name, lambda: False)())

    features = [
        label
        for label, name in (
            ("AVX2", "_is_avx2_supported"),
            ("AVX-512", "_is_avx512_supported"),
            ("bf16", "_is_avx512_bf16_supported"),
            ("AMX", "_is_amx_tile_supported"),
        )
        if supported(name)
    ]
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} processors"
    rows = [_check("cpu", ", ".join([threads, *features]))]
    load, processors = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0, os.cpu_count() or 1
    if load > processors:
        said = (
            f"{load:.1f} on {processors} processors: other programs take turns with this one. In "
            "your own scripts set GOMP_SPINCOUNT=3000 before PyTorch is imported; the command does"
        )
        rows.append(_check("load", said, NOTE))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            found = f"{p.name}, {human_bytes(p.total_memory)}, compute {p.major}.{p.minor}"
            rows.append(_check(f"cuda:{index}", found))
    else:
        rows.append(_check("cuda", "no CUDA device; the CPU is used", NOTE))
    if torch.backends.mps.is_available():
        rows.append(_check("mps", "available"))
    return rows


def _extension() -> list[dict[str, Any]]:
    import torch

    from fmupsample.ops.backend import get_backend
    from fmupsample.ops.building.compiling import find_tools, version
    from fmupsample.ops.building.extension import EXTENSION

    rows = [_extension_state(EXTENSION)]
    try:
        if get_backend() != "auto":
            rows.append(_check("backend", f"{get_backend()}, by FMUPSAMPLE_BACKEND"))
    except FmupsampleError as error:
        rows.append(_check("backend", str(error), NOTE))
    if EXTENSION.loaded is not None:
        rows.append(_comparison())
    for name, path in zip(("nvcc", "c++", "ninja"), find_tools(torch.version.cuda), strict=True):
        row = (f"{version(path)}, {path}",) if path else ("not found", NOTE)
        rows.append(_check(name, *row))
    return rows


def _extension_state(extension: Extension) -> dict[str, Any]:
    """What a GPU's operators would be computed by, and why. Compiles nothing."""
    from fmupsample.ops.building.extension import capabilities

    gpus = capabilities()
    try:
        extension.check()
        library, refused = extension.packaged(gpus)
        library = library or extension.cached(gpus)
        aside = f" ({refused})" if refused else ""
        if library is not None:
            where = f"{library.path}, for {', '.join(library.targets) or 'the CPU'}{aside}"
            if not gpus:
                return _check(_EXTENSION, f"compiled, not used: no CUDA device; {where}", NOTE)
            extension.load()
            return _check(_EXTENSION, f"loaded: {where}")
        failure = extension.remembered(extension.targets() if gpus else None)
        if failure is not None:
            return _check(_EXTENSION, f"failed, plain PyTorch is used: {failure}", NOTE)
        if not gpus:
            return _check(_EXTENSION, f"not usable: no CUDA device{aside}", NOTE)
        extension.tools()
    except FmupsampleError as error:
        return _check(_EXTENSION, f"not usable, plain PyTorch is used: {error}", NOTE)
    when = "would be compiled at the first use; `fmupsample build` does it now"
    return _check(_EXTENSION, f"{when}{aside}", NOTE)


def _comparison() -> dict[str, Any]:
    """The extension against plain PyTorch on a small map: values and both gradients."""
    import torch

    from fmupsample.ops import plain

    try:
        compiled = import_module("fmupsample.ops.cuda")
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to("cuda")

        value, weights = random(2, 24, 5, 7), random(2, 9, 70, 98).softmax(1)
        grad = random(2, 24, 70, 98)
        worst = 0.0
        for fractional in (True, False):
            for name, arguments in (
                ("reassemble", (value, weights, fractional)),
                ("grad_value", (grad, weights, 5, 7, fractional)),
                ("grad_weights", (grad, value, 3, fractional)),
            ):
                ours = getattr(compiled, name)(*arguments)
                theirs = getattr(plain, name)(*arguments)
                difference = (ours - theirs).abs().max() / theirs.abs().max()
                worst = max(worst, float(difference))
    except (ImportError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return _check("extension's results", f"it does not run: {first}", BAD)
    # Plain PyTorch may multiply in TF32.
    good = worst < (1e-2 if torch.backends.cuda.matmul.allow_tf32 else 1e-4)
    found = f"largest difference from plain PyTorch {worst:.1e} of the largest value"
    return _check("extension's results", found, OK if good else BAD)


def _caches() -> list[dict[str, Any]]:
    from fmupsample.backbones.cache import cached_timm_repositories, hub_cache
    from fmupsample.folders import cache_folder

    hub, own = hub_cache(), cache_folder()
    count, heads = len(cached_timm_repositories()), len(list(own.glob("heads/*.safetensors")))
    builds = own / "extensions"
    libraries = len(list(builds.glob("*.so")))
    return [
        _check("hub cache", f"{hub}: {count} timm models, {human_bytes(_folder_size(hub))}"),
        _check("own cache", f"{own}: {heads} heads, {human_bytes(_folder_size(own))}"),
        _check("extensions", f"{builds}: {libraries} compiled"),
    ]


def _folder_size(folder: Path) -> int:
    """Bytes in ``folder``; links, which the hub cache is full of, are not counted twice."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            file = Path(path, name)
            if not file.is_symlink():
                total += file.stat().st_size
    return total


def _weights() -> list[dict[str, Any]]:
    from fmupsample_weights import FOLDER, find_weights, list_weights

    rows = [_file_check(path) for path in list_weights()]
    if find_weights("embedded") is None:
        rows.append(_check("embedded", f"no embedded.safetensors in {FOLDER}", BAD))
    elif not any(row["state"] == BAD for row in rows):
        rows.append(_trial())
    return rows


def _file_check(path: Path) -> dict[str, Any]:
    """Reads the whole file: every tensor is there and finite."""
    import hashlib

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from fmupsample_weights import read_metadata

    metadata = read_metadata(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        return _check(path.name, f"cannot be read: {error}", BAD)
    if not all(bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point()):
        return _check(path.name, "holds numbers that are not finite", BAD)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    about = metadata.get("tag") or metadata.get("format", "no header")
    if metadata.get("format", "").startswith("fmupsample-head/"):
        made_for = json.loads(metadata.get("backbone", "{}")).get("name", "?")
        about = f"{metadata.get('upsampler', '?')} head for {made_for}"
    return _check(path.name, f"{about}, {human_bytes(path.stat().st_size)}, sha256 {digest[:12]}")


def _trial() -> dict[str, Any]:
    """Features of a small grey picture, upsampled with the shipped head."""
    import torch

    from fmupsample.backbones import load_backbone
    from fmupsample.errors import HeadError

    try:
        begin = time.perf_counter()
        backbone = load_backbone()
        size = tuple(max(4 * m, 64 // m * m) for m in backbone.size_multiple)
        picture = torch.zeros(1, 3, *size)
        with torch.inference_mode():
            features = backbone(picture)
            try:
                from fmupsample.upsamplers import load_upsampler

                method = load_upsampler(backbone)
            except HeadError as error:
                return _check("trial run", f"the embedded backbone has no head: {error}", BAD)
            result = method(features, picture)
        seconds = time.perf_counter() - begin
    except FmupsampleError as error:
        return _check("trial run", str(error), BAD)
    if not bool(torch.isfinite(result).all()):
        return _check("trial run", "the features are not finite", BAD)
    found = f"{size[0]}x{size[1]} picture -> {list(result.shape[1:])} in {seconds:.1f} s"
    return _check("trial run", found)
