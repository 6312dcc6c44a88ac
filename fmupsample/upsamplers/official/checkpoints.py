"""Checkpoints of other authors: the published ones, and local files of them."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fmupsample.atomic import replacing
from fmupsample.errors import HeadError
from fmupsample.fingerprint import fingerprint
from fmupsample.folders import cache_folder
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.official.encoders import load_anyup, load_jafar
from fmupsample.upsamplers.official.naf import load_naf
from fmupsample.upsamplers.official.uplift import load_uplift

_PICKLED = (".pth", ".pt")
_SECONDS = 20  # without an answer

_ANYUP = "AnyUp, Wimmer et al. 2025, CC-BY-4.0"
_RELEASES = "https://github.com/wimmerth/anyup/releases/download"
_JAFAR = "JAFAR, Couairon et al. 2025, Apache-2.0"
_JAFAR_RELEASES = "https://github.com/PaulCouairon/JAFAR/releases/download/Weights"
_NAF = "NAF, Chambon et al. 2025, Apache-2.0"
_UPLIFT = "UPLiFT, Walmer et al. 2026, MIT"


@dataclass(frozen=True)
class Checkpoint:
    """A published file.

    Attributes:
        method: the name that goes to ``--upsampler``.
        sha256, bytes: of the file; ``None``: not known here, so that it is not downloaded by
            itself but given with ``--head``.
        credit: the method, its authors and the licence, to be shown with it.
        backbone: full name of the only backbone it serves; ``None``: any.
    """

    name: str
    method: str
    url: str
    sha256: str | None
    bytes: int | None
    credit: str
    backbone: str | None = None

    @property
    def needs(self) -> str:
        """What one must have to use it."""
        if self.bytes is None:
            return "a file (--head)"
        return f"a download ({self.bytes / 1e6:.1f} MB)"

    @property
    def path(self) -> Path:
        """Where it is kept in the cache."""
        return cache_folder() / "heads" / f"{self.name}.pth"


# The first of a method is the one that its name means.
CHECKPOINTS = (
    Checkpoint(
        "anyup_multi_backbone",
        "anyup",
        f"{_RELEASES}/checkpoint_v2/anyup_multi_backbone.pth",
        "b6cc407da8986c7e5c9098e61f7531767a9aca8fff20a1bc6c99d488e61aac59",
        3541624,
        f"{_ANYUP}; trained on several backbones",
    ),
    Checkpoint(
        "anyup_paper",
        "anyup",
        f"{_RELEASES}/checkpoint/anyup_paper.pth",
        "9d035c0f27114a6f32bdd3d8ed93b6cd39dad4b8f8bf94e69fddbfbf022901b2",
        3540612,
        f"{_ANYUP}; trained on DINOv2 ViT-S/14",
    ),
    Checkpoint(
        "naf_release",
        "naf",
        "https://github.com/valeoai/NAF/releases/download/model/naf_release.pth",
        None,
        None,
        _NAF,
    ),
    *(
        Checkpoint(
            f"jafar_{tag}", "jafar", f"{_JAFAR_RELEASES}/{tag}.pth", None, None,
            f"{_JAFAR}; for {tag}", tag,
        )
        for tag in (
            "vit_small_patch14_dinov2.lvd142m",
            "vit_base_patch14_dinov2.lvd142m",
            "vit_base_patch16_siglip_512.v2_webli",
        )
    ),
    Checkpoint(
        "uplift_dinov2-s14",
        "uplift",
        "https://huggingface.co/UPLiFT-upsampler/uplift_dinov2-s14",
        None,
        None,
        f"{_UPLIFT}; for vit_small_patch14_dinov2.lvd142m",
        "vit_small_patch14_dinov2.lvd142m",
    ),
)  # fmt: skip
# Which parameter tells whose checkpoint it is.
_LOADERS = {
    "key_features_encoder.0.basis": load_anyup,
    "sft_key.gamma.weight": load_jafar,
    "image_encoder.rope.periods": load_naf,
    "attender.conv1.weight": load_uplift,
}


def published(method: str, backbone: str | None = None) -> Checkpoint | None:
    """The checkpoint that a method's name means, for a backbone or for any, if there is one."""
    for each in CHECKPOINTS:
        if each.method == method and each.backbone in (None, backbone):
            return each
    return None


def fetched(checkpoint: Checkpoint) -> Path:
    """Its file in the cache, downloaded at first use.

    Raises:
        HeadError: no network, not the file that was published, or one without a known SHA-256.
    """
    if checkpoint.sha256 is None or checkpoint.bytes is None:
        raise HeadError(
            f"{checkpoint.method} needs the authors' checkpoint ({checkpoint.credit}): download "
            f"{checkpoint.url} and give it with --head FILE"
        )
    path = checkpoint.path
    if path.is_file() and _sha256(path.read_bytes()) == checkpoint.sha256:
        return path
    advice = f"download {checkpoint.url} on another machine and give it with --head FILE"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise HeadError(
            f"{checkpoint.name} is not in the cache and offline mode is on (HF_HUB_OFFLINE): "
            f"{advice}"
        )
    try:
        with urlopen(checkpoint.url, timeout=_SECONDS) as answer:
            data = answer.read(checkpoint.bytes + 1)
    except OSError as error:
        raise HeadError(f"{checkpoint.name} cannot be downloaded ({error}): {advice}") from error
    if _sha256(data) != checkpoint.sha256:
        raise HeadError(
            f"{checkpoint.url} gives another file than the published {checkpoint.name} (SHA-256): "
            f"{advice}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise HeadError(f"{checkpoint.name} cannot be kept in {path.parent}: {error}") from error
    return path


def is_checkpoint(path: Path) -> bool:
    """Whether a file is one of parameters under official names, and no head file of ours."""
    if path.suffix in _PICKLED:
        return True
    try:
        with safe_open(path, framework="pt") as file:
            return not _LOADERS.keys().isdisjoint(file.keys())
    except (SafetensorError, OSError, ValueError):
        return False


def load_checkpoint(path: str | Path) -> Upsampler:
    """An upsampler from a local checkpoint, recognised by the names of its parameters.

    Raises:
        HeadError: not readable without unpickling objects, or of no known method.
    """
    path = Path(path)
    if not path.is_file():
        raise HeadError(f"there is no head file {path}")
    try:
        if path.suffix in _PICKLED:
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            state = load_file(path)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise HeadError(f"{path} is not a readable checkpoint of parameters: {error}") from error
    if isinstance(state, Mapping) and isinstance(state.get("jafar"), Mapping):
        state = state["jafar"]  # the authors keep it with the state of their training
    sound = isinstance(state, Mapping) and all(isinstance(x, Tensor) for x in state.values())
    load = next((f for name, f in _LOADERS.items() if sound and name in state), None)
    if load is None:
        known = ", ".join(f.__name__.removeprefix("load_") for f in _LOADERS.values())
        raise HeadError(
            f"{path} holds no parameters of a method that is known by them ({known}); "
            "other checkpoints: fmupsample.load_official"
        )
    head = load(dict(state))
    head.fingerprint = fingerprint(state)
    return head.requires_grad_(False)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
