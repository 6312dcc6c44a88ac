"""What the tests of training share: drawn pictures, small options, a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from toy import ToyBackbone

from fmupsample.images import find_images
from fmupsample.training.config import TrainConfig
from fmupsample.training.report import TrainReport
from fmupsample.training.run import train

HEAD = {
    "embedding": 8,
    "middle": 16,
    "groups": 2,
    "norm_groups": 2,
    "guidance_channels": 4,
}
SMALL = {
    "upsampler": "resfu",  # without a prior, it has more to learn
    "upsampler_config": HEAD,
    "objective": {"crops": 1.0},
    "image_sizes": [32],
    "side": 48,
    "steps": 8,
    "batch_size": 2,
    "validate_every": 4,
    "log_every": 1,
    "previews": 1,
}


def draw_pictures(folder: Path, count: int = 8, side: int = 64, labels: Path | None = None) -> Path:
    """Discs on coloured grounds; with ``labels``, indexed PNGs that say 1 on the disc, else 0."""
    random = np.random.default_rng(5)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        ground, disc = (tuple(int(v) for v in random.integers(0, 256, 3)) for _ in range(2))
        x, y, r = (int(v) for v in random.integers(side // 4, side // 2, 3))
        box = (x - r // 2, y - r // 2, x + r // 2, y + r // 2)
        picture = Image.new("RGB", (side + 8 * (number % 3), side), ground)
        ImageDraw.Draw(picture).ellipse(box, fill=disc)
        picture.save(folder / f"{number:02}.png")
        if labels is not None:
            labels.mkdir(parents=True, exist_ok=True)
            indexed = Image.new("P", picture.size, 0)
            indexed.putpalette([0, 0, 0, 255, 255, 255] + [0] * 762)
            ImageDraw.Draw(indexed).ellipse(box, fill=1)
            indexed.save(labels / f"{number:02}.png")
    return folder


def options(**changes: object) -> TrainConfig:
    return TrainConfig.from_dict({**SMALL, **changes})


def run(pictures: Path, output: Path, config: TrainConfig | None = None, **more) -> TrainReport:
    """A run on the CPU with the toy backbone."""
    more = {"device": "cpu", "workers": 1, **more}
    backbone = more.pop("backbone", None) or ToyBackbone()
    return train(backbone, find_images([pictures]), output, config or options(), **more)


# What these add cancels (keys minus queries, a norm right after): their gradient is rounding noise,
# which Adam enlarges. They mean nothing, and agree only where every sum is done in the same order.
_CANCELLED = ("semantic_scores.norm.bias", "detail_scores.norm.bias", "stem.mix.bias")


def assert_same(one: Path, two: Path, tolerance: float = 0.0) -> None:
    """The two head files hold the same parameters."""
    a, b = load_file(one), load_file(two)
    assert a.keys() == b.keys()
    for name in a:
        if tolerance and name in _CANCELLED:
            continue
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=name)
