"""A head at once: trained briefly on the pictures at hand, and kept for later runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from fmupsample.backbones import Backbone
from fmupsample.folders import cache_folder
from fmupsample.images.find import Source
from fmupsample.progress import SILENT, Progress
from fmupsample.runs.lock import FolderLock
from fmupsample.training.config import TrainConfig
from fmupsample.training.inputs import Say
from fmupsample.training.report import TrainReport
from fmupsample.training.run import train
from fmupsample.upsamplers.loading import find_head
from fmupsample.upsamplers.registry import METHODS

# A few minutes: enough to be sharper than bilinear interpolation, not all that a head can learn.
_STEPS, _STEPS_GPU = 150, 600


def fitted_head_path(backbone: Backbone, upsampler: str) -> Path:
    """Where the head of these very weights and this layer is kept."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", backbone.name)
    key = f"{name}-layer{backbone.layer}-{backbone.fingerprint}"
    return cache_folder() / "heads" / f"{key}.{upsampler}.safetensors"


def fit_head(
    backbone: Backbone,
    sources: Sequence[Source],
    upsampler: str = TrainConfig.upsampler,
    *,
    device: torch.device,
    config: TrainConfig | None = None,
    progress: Progress = SILENT,
    say: Say = lambda _: None,
) -> TrainReport | None:
    """Train a head for ``backbone`` on ``sources`` with a short budget, into the cache.

    Another process that trains the same head is waited for; ``None``: it has made the head.

    Args:
        config: instead of the short budget.

    Raises:
        UsageError: too few or too small pictures.
    """
    path = fitted_head_path(backbone, upsampler)
    there = path.exists()
    waiting = partial(say, f"another run trains the {upsampler} head: waiting for it")
    with FolderLock(path.with_suffix(".fitting"), wait=waiting):
        if path.exists() and not there:
            return None
        say(f"there is no {upsampler} head for {backbone.name}: training one on these pictures")
        steps = _STEPS_GPU if device.type == "cuda" else _STEPS
        config = config or TrainConfig(
            upsampler=upsampler, steps=steps, lr=2e-3, validate_every=-(-steps // 3), previews=0
        )
        return train(
            backbone, sources, path, config, device=device, overwrite=True,
            # A head for any backbone, where there is one, knows most of what is to be learned.
            start_from=find_head(backbone, upsampler) if METHODS[upsampler].own_heads else None,
            data=f"{len(sources)} pictures of a run",
            recipe=f"--fit-head with {backbone.name}",
            progress=progress, say=say,
        )  # fmt: skip
