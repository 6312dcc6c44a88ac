"""Official parameter names of the operators that are not by similarity."""

from __future__ import annotations

from torch import Tensor

from fmupsample.errors import HeadError
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.carafe import CARAFE, CARAFEConfig
from fmupsample.upsamplers.dysample import DySample, DySampleConfig
from fmupsample.upsamplers.fade import FADE, FADEConfig
from fmupsample.upsamplers.official.filling import fill, renamed, required
from fmupsample.upsamplers.stack import LearnedBilateralStack, StackConfig

_CARAFE_NAMES = {"channel_compressor": "compress", "content_encoder": "encode"}
_FADE_NAMES = {
    "gate_generator.conv": "gate",
    "ker_generator.compressor_en": "compress_guidance",
    "ker_generator.compressor_de": "compress_features",
    "ker_generator.content_encoder": "encode",
}
_BILATERAL_NAMES = {
    "range_temp": "temperature",
    "sigma_spatial": "sigma",
    "range_proj.0": "project.0",
    "range_proj.3": "project.1",
    "fixup_proj.0": "correct.0",
    "fixup_proj.3": "correct.1",
}


def load_dysample(
    state: dict[str, Tensor],
    *,
    scale: int = 2,
    style: str = "lp",
    groups: int = 4,
    dyscope: bool | None = None,
    in_channels: int | None = None,
) -> Upsampler:
    """``dyscope`` and ``in_channels`` are in the shapes."""
    what = "official DySample parameters"
    # Where bilinear upsampling has the pixels; here they are computed.
    state = {name: tensor for name, tensor in state.items() if name != "init_pos"}
    channels = required(state, "offset.weight", what).shape[1]
    config = DySampleConfig(
        channels=channels * scale**2 if style == "pl" else channels,
        ratio=scale,
        style=style,
        groups=groups,
        dynamic_scope="scope.weight" in state,
    )
    return fill(DySample(config), state, what)


def load_carafe(
    state: dict[str, Tensor], *, scale_factor: int = 2, up_kernel: int = 5, up_group: int = 1
) -> Upsampler:
    """One group only."""
    what = "official CARAFE parameters"
    if up_group != 1:
        raise HeadError(f"{what} with {up_group} groups cannot be loaded, only those with one")
    state = renamed(state, _CARAFE_NAMES)
    compressed, channels = required(state, "compress.weight", what).shape[:2]
    config = CARAFEConfig(
        channels=channels,
        ratio=scale_factor,
        kernel_size=up_kernel,
        compressed=compressed,
        encoder_kernel_size=required(state, "encode.weight", what).shape[-1],
        border="zeros",
    )
    return fill(CARAFE(config), state, what)


def load_fade(state: dict[str, Tensor], *, scale: int = 2) -> Upsampler:
    """FADE, FADE-Lite, or semi-shift upsampling alone, where there is no gate."""
    what = "official FADE parameters"
    state = renamed(state, _FADE_NAMES)
    encode = required(state, "encode.weight", what)
    config = FADEConfig(
        channels=required(state, "compress_features.weight", what).shape[1],
        guidance_channels=required(state, "compress_guidance.weight", what).shape[1],
        stem=False,
        gate="gate.weight" in state,
        kernel_size=round(len(encode) ** 0.5),
        compressed=len(state["compress_features.weight"]),
        encoder_kernel_size=encode.shape[-1],
        lite=encode.shape[1] == 1,
        border="zeros",
    )
    return fill(FADE(config), state, what)


def load_featup(state: dict[str, Tensor]) -> Upsampler:
    """``JBUStack``: four stages on the normalised picture."""
    what = "official FeatUp parameters"
    names = {
        f"up{n + 1}.{a}": f"stages.{n}.{b}" for n in range(6) for a, b in _BILATERAL_NAMES.items()
    }
    state = renamed(state, names | {"fixup_proj.1": "correct"})
    count = len(required(state, "stages.0.correct.1.bias", what))
    operator = {
        "guidance_channels": required(state, "stages.0.project.0.weight", what).shape[1],
        "kernel_size": round(count**0.5),
        "embedding": len(required(state, "stages.0.project.0.bias", what)),
    }
    config = StackConfig(
        channels=len(required(state, "correct.bias", what)),
        stages=sum(name.endswith(".temperature") for name in state),
        operator=operator,
    )
    return fill(LearnedBilateralStack(config), state, what)
