"""Fixtures shared by all tests: no network, no caches of the person who runs them, tiny models."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples on every run, and no clock in a test.
settings.register_profile("fmupsample", deadline=None, derandomize=True)
settings.load_profile("fmupsample")

# Before anything imports torch: tests run beside other programs.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# Before anything imports huggingface_hub or torch.hub, which read these once.
_HOME = tempfile.TemporaryDirectory(prefix="fmupsample-tests-")
os.environ["HF_HOME"] = str(Path(_HOME.name, "huggingface"))
os.environ["TORCH_HOME"] = str(Path(_HOME.name, "torch"))
os.environ["FMUPSAMPLE_CACHE"] = str(Path(_HOME.name, "fmupsample"))
os.environ["HF_HUB_OFFLINE"] = "1"
for name in (
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "FMUPSAMPLE_DEBUG",
    "FMUPSAMPLE_BACKEND",
    "FORCE_COLOR",
    "TORCH_CUDA_ARCH_LIST",
    "MAX_JOBS",
):
    os.environ.pop(name, None)


# What takes long: processes that are started, killed and compared, heads and decoders that are
# trained, programs that are compiled. `make test` leaves these out, `make test-all` does not.
SLOW = {
    "test_benchmarks",
    "test_compile",
    "test_equal_steps",
    "test_examples_decoders",
    "test_export",
    "test_extract_distributed",
    "test_extract_ray",
    "test_films_distributed",
    "test_killed_runs",
    "test_leave_one_out",
    "test_power_failure",
    "test_recipes",
    "test_training_distributed",
    "test_visualize_distributed",
    "test_windows",
}


def pytest_collection_modifyitems(items):
    import torch

    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def backend_as_it_was():
    """The choice of a backend is the process's; no test leaves one behind."""
    yield
    from fmupsample.ops.backend import set_backend

    set_backend(None)


@pytest.fixture(scope="session")
def tiny_backbone():
    """timm's 0.4M-parameter test ViT with fixed random weights: 64 channels, stride 16."""
    import torch

    from fmupsample.backbones import load_backbone

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return load_backbone("test_vit", pretrained=False)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of three small drawn pictures, one of them in a subfolder."""
    from PIL import Image, ImageDraw

    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    drawn = {"disc.png": (96, 64), "deep/bar.jpg": (64, 96), "square.png": (80, 80)}
    for number, (name, size) in enumerate(drawn.items()):
        picture = Image.new("RGB", size, (40, 60 + 50 * number, 120))
        draw = ImageDraw.Draw(picture)
        if number == 0:
            draw.ellipse((20, 10, 60, 50), fill=(220, 60, 40))
        else:
            draw.rectangle((10, 20, 45, 40), fill=(230, 200, 40))
        picture.save(folder / name)
    return folder


@pytest.fixture
def backbone_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a backbone file in the format of the embedded model, with random weights.

    ``backbone_file(name, **changes)``: ``changes`` replace header fields (``None`` removes one).
    """

    def write(name: str = "embedded.safetensors", **changes: str | None) -> Path:
        import timm
        import torch
        from safetensors.torch import save_file

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True)
        header: dict[str, str | None] = {
            "format": "fmupsample-backbone/1",
            "architecture": "test_vit",
            "model_args": json.dumps({"dynamic_img_size": True}),
            "tag": "embedded.v1",
            "mean": "[0.5, 0.4, 0.3]",
            "std": "[0.2, 0.2, 0.25]",
            "image_size": "160",
            "card": json.dumps({"data": "none"}),
        }
        header.update(changes)
        path = tmp_path / name
        save_file(
            {key: value.half().contiguous() for key, value in model.state_dict().items()},
            path,
            metadata={key: value for key, value in header.items() if value is not None},
        )
        return path

    return write
