"""AnyUp, literally: dense attention with a mask, loops over cells, the official parameter names."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPS = 8


def random_state(e: int = 16, filters: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """Random parameters in float64 under their official names."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    state = {}
    for name, inputs in (
        ("image_encoder", 3), ("key_encoder", e), ("query_encoder", e),
        ("key_features_encoder", None), ("aggregation", 2 * e),
    ):  # fmt: skip
        if inputs is None:
            state[f"{name}.0.basis"] = draw(e, 1, filters, filters)
        else:
            side = 3 if name == "aggregation" else 1
            scale = (inputs * side**2) ** -0.5
            state[f"{name}.0.weight"] = draw(e, inputs, side, side, scale=scale)
        for block in (1, 2):
            for layer in (0, 3):
                state[f"{name}.{block}.block.{layer}.weight"] = 1 + draw(e, scale=0.3)
                state[f"{name}.{block}.block.{layer}.bias"] = draw(e, scale=0.3)
            for layer in (2, 5):
                state[f"{name}.{block}.block.{layer}.weight"] = draw(e, e, 1, 1, scale=e**-0.5)
    attention = "cross_decode.cross_attn"
    state[f"{attention}.norm_q.weight"] = 1 + draw(e, scale=0.3)
    state[f"{attention}.norm_k.weight"] = 1 + draw(e, scale=0.3)
    state[f"{attention}.attention.in_proj_weight"] = draw(3 * e, e, scale=2 * e**-0.5)
    state[f"{attention}.attention.in_proj_bias"] = draw(3 * e, scale=0.3)
    state[f"{attention}.attention.out_proj.weight"] = draw(e, e)
    state[f"{attention}.attention.out_proj.bias"] = draw(e)
    state["cross_decode.conv2d.weight"] = draw(e, e, 3, 3, scale=(9 * e) ** -0.5)
    state["rope.freqs"] = draw(2, e, scale=3.0)
    return state


def upsample(
    state: dict[str, Tensor],
    image: Tensor,
    features: Tensor,
    size: tuple[int, int],
    heads: int = 4,
    ratio: float = 0.1,
) -> Tensor:
    """``[3, H, W]`` and ``[C, h, w]`` -> ``[C, *size]``."""
    attention = weights(state, image, features, size, heads, ratio)
    return torch.einsum("pc,vc->vp", attention, features.flatten(1)).view(-1, *size)


def weights(state, image, features, size, heads=4, ratio=0.1) -> Tensor:
    """What pixels make of all cells, ``[H W, h w]``."""
    h, w = features.shape[1:]
    encoded = _encoder(state, "image_encoder", image)
    e = len(encoded)
    turned = torch.empty_like(encoded)
    height, width = image.shape[1:]
    for y in range(height):
        for x in range(width):
            place = torch.tensor([y / (height - 1), x / (width - 1)], dtype=torch.float64)
            angle = place @ state["rope.freqs"]
            pixel = encoded[:, y, x]
            partner = torch.cat([-pixel[e // 2 :], pixel[: e // 2]])
            turned[:, y, x] = pixel * angle.cos() + partner * angle.sin()

    queries = F.adaptive_avg_pool2d(_encoder(state, "query_encoder", turned), size)
    queries = F.conv2d(queries[None], state["cross_decode.conv2d.weight"], padding=1)[0]
    image_keys = F.adaptive_avg_pool2d(_encoder(state, "key_encoder", turned), (h, w))
    joint = torch.cat([image_keys, _feature_keys(state, features)])
    padded = F.pad(joint[None], (1, 1, 1, 1), mode="reflect")
    keys = F.conv2d(padded, state["aggregation.0.weight"])[0]
    keys = _blocks(state, "aggregation", keys)

    name = "cross_decode.cross_attn"
    q = _projected(state, queries, f"{name}.norm_q.weight", 0)
    k = _projected(state, keys, f"{name}.norm_k.weight", 1)
    inside = window(size, (h, w), ratio)
    total = torch.zeros(inside.shape, dtype=torch.float64)
    for head in range(heads):
        part = slice(head * e // heads, (head + 1) * e // heads)
        scores = q[:, part] @ k[:, part].T / math.sqrt(e // heads)
        total += scores.masked_fill(~inside, -math.inf).softmax(1) / heads
    return total


def window(size: tuple[int, int], cells: tuple[int, int], ratio: float) -> Tensor:
    """Bool ``[H W, h w]``: cells that a window touches, which ends a share of the map away."""
    axes = []
    for pixels, count in zip(size, cells, strict=True):
        inside = torch.zeros(pixels, count, dtype=torch.bool)
        for p in range(pixels):
            centre = (p + 0.5) / pixels
            first, last = max(0.0, centre - ratio) * count, min(1.0, centre + ratio) * count
            inside[p, math.floor(first) : math.ceil(last)] = True
        axes.append(inside)
    down, across = axes
    return (down[:, None, :, None] & across[None, :, None, :]).flatten(2).flatten(0, 1)


def _feature_keys(state: dict[str, Tensor], features: Tensor) -> Tensor:
    filters = state["key_features_encoder.0.basis"][:, 0]
    (c, h, w), (e, side, _) = features.shape, filters.shape
    lengths = features.square().sum(0).sqrt()
    features = features / lengths
    described = torch.zeros(e, h, w, dtype=torch.float64)
    for y in range(h):
        for x in range(w):
            responses = torch.zeros(c, e, dtype=torch.float64)
            count = 0
            for i in range(side):
                for j in range(side):
                    row, column = y + i - side // 2, x + j - side // 2
                    if 0 <= row < h and 0 <= column < w:
                        responses += features[:, row, column, None] * filters[:, i, j]
                        count += 1
            # In the order of channels and filters, but taken for filters and channels.
            taken = (responses / count).reshape(c * e).reshape(e, c)
            described[:, y, x] = taken.softmax(0).mean(1)
    return _blocks(state, "key_features_encoder", described)


def _encoder(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return _blocks(state, name, _pointwise(state[f"{name}.0.weight"], x))


def _blocks(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    for block in (1, 2):
        branch = x
        for norm, convolution in ((0, 2), (3, 5)):
            branch = _group_norm(state, f"{name}.{block}.block.{norm}", branch)
            branch = branch * torch.sigmoid(branch)
            weight = state[f"{name}.{block}.block.{convolution}.weight"]
            branch = _pointwise(weight, branch)
        x = x + branch
    return x


def _pointwise(weight: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("oi,ihw->ohw", weight[:, :, 0, 0], x)


def _group_norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    grouped = x.reshape(GROUPS, -1)
    mean = grouped.mean(1, keepdim=True)
    variance = (grouped - mean).square().mean(1, keepdim=True)
    normal = ((grouped - mean) / (variance + 1e-5).sqrt()).view(x.shape)
    return normal * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def _projected(state: dict[str, Tensor], x: Tensor, norm: str, which: int) -> Tensor:
    e = len(x)
    flat = x.flatten(1).T  # [positions, E]
    power = flat.square().mean(1, keepdim=True) + torch.finfo(torch.float64).eps
    name = "cross_decode.cross_attn.attention.in_proj"
    part = slice(which * e, (which + 1) * e)
    normal = flat / power.sqrt() * state[norm]
    return normal @ state[f"{name}_weight"][part].T + state[f"{name}_bias"][part]
