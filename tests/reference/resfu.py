"""ReSFU evaluated word for word, in float64: slow, plain, and the meaning the fast path must have.

Written from the definition (Zhou et al., "A Refreshed Similarity-based Upsampler for Direct
High-Ratio Feature Upsampling", 2024), with one loop per neighbour and no identity used. The
parameters are a mapping of names to tensors in the official layout.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

KERNEL = 3
BOX_RADIUS = 4  # on the half grid: radius 8 pixels
GUIDED_EPS = 1e-3


def sample_cells(value: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Bilinear samples of ``[B, C, h, w]`` at coordinates ``y`` ``[H]``, ``x`` ``[W]``, clamped."""
    h, w = value.shape[-2:]
    y, x = y.clamp(0, h - 1), x.clamp(0, w - 1)
    y0, x0 = y.floor().long(), x.floor().long()
    y1, x1 = (y0 + 1).clamp(max=h - 1), (x0 + 1).clamp(max=w - 1)
    fy, fx = (y - y0).to(value.dtype)[:, None], (x - x0).to(value.dtype)
    top = value[:, :, y0][..., x0] * (1 - fx) + value[:, :, y0][..., x1] * fx
    bottom = value[:, :, y1][..., x0] * (1 - fx) + value[:, :, y1][..., x1] * fx
    return top * (1 - fy) + bottom * fy


def lr_coordinates(cells: int, pixels: int) -> Tensor:
    return (torch.arange(pixels, dtype=torch.float64) + 0.5) * cells / pixels - 0.5


def box_mean(value: Tensor) -> Tensor:
    """Mean over the (2r+1)^2 window, divided by the number of pixels truly inside the map."""
    size = 2 * BOX_RADIUS + 1
    ones = torch.ones_like(value[:1, :1])

    def total(v: Tensor) -> Tensor:
        kernel = torch.ones(v.shape[1], 1, size, size, dtype=v.dtype)
        return F.conv2d(v, kernel, padding=BOX_RADIUS, groups=v.shape[1])

    return total(value) / total(ones)


def guided_filter(guide: Tensor, target: Tensor) -> Tensor:
    """Per-channel fast guided filter (He & Sun 2015), subsampled twice by nearest neighbour."""
    height, width = guide.shape[-2:]
    g = F.interpolate(guide, scale_factor=0.5, mode="nearest")
    t = F.interpolate(target, scale_factor=0.5, mode="nearest")
    mean_g, mean_t = box_mean(g), box_mean(t)
    covariance = box_mean(g * t) - mean_g * mean_t
    variance = box_mean(g * g) - mean_g * mean_g
    a = covariance / (variance + GUIDED_EPS)
    b = mean_t - a * mean_g
    a, b = box_mean(a), box_mean(b)
    a = F.interpolate(a, size=(height, width), mode="bilinear", align_corners=False)
    b = F.interpolate(b, size=(height, width), mode="bilinear", align_corners=False)
    return a * guide + b


def gaussian(value: Tensor) -> Tensor:
    offsets = torch.arange(-1, 2, dtype=value.dtype)
    line = torch.exp(-(offsets**2) / 2)
    kernel = (line[:, None] * line) / line.sum() ** 2
    kernel = kernel.expand(value.shape[1], 1, 3, 3).contiguous()
    padded = F.pad(value, (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, kernel, groups=value.shape[1])


def pcdc_scores(
    p: Mapping[str, Tensor], pair: str, key: Tensor, query: Tensor, stride: int, groups: int
) -> Tensor:
    """Paired central difference convolution and its compressor, ``[B, K*K, H, W]``."""
    gn = p[f"{pair}.norm.weight"], p[f"{pair}.norm.bias"]
    key = F.group_norm(key, 8, *gn)
    query = F.group_norm(query, 8, *gn)
    height, width = key.shape[-2:]
    weight = p[f"{pair}.weight"]
    total = p[f"{pair}.bias"]
    reach = KERNEL // 2
    for i in range(KERNEL):
        for j in range(KERNEL):
            y = (torch.arange(height) + (i - reach) * stride).clamp(0, height - 1)
            x = (torch.arange(width) + (j - reach) * stride).clamp(0, width - 1)
            difference = key[:, :, y][..., x] - query
            total = total + F.conv2d(difference, weight[:, :, i, j, None, None], groups=groups)
    c = f"{pair}.channel_compressor"
    z = F.conv2d(F.relu(total), p[f"{c}.1.weight"], p[f"{c}.1.bias"], groups=groups)
    z = F.group_norm(F.relu(z), 8, p[f"{c}.3.weight"], p[f"{c}.3.bias"])
    return F.conv2d(z, p[f"{c}.4.weight"], p[f"{c}.4.bias"])


def input_norm(value: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GroupNorm with 32 groups; the official modules use one a channel where there are fewer."""
    return F.group_norm(value, min(32, value.shape[1]), weight, bias)


def resfu(
    p: Mapping[str, Tensor], x: Tensor, guidance: Tensor, groups: int = 4
) -> tuple[Tensor, Tensor]:
    """``(upsampled [B, C, H, W], kernel weights [B, K*K, H, W])`` for an integer ratio."""
    (h, w), (height, width) = x.shape[-2:], guidance.shape[-2:]
    stride = height // h
    q = F.conv2d(input_norm(guidance, p["norm_y.weight"], p["norm_y.bias"]), p["q.weight"])
    q = q + p["q.bias"][:, None, None]
    k = F.conv2d(input_norm(x, p["norm_x.weight"], p["norm_x.bias"]), p["k.weight"])
    k = k + p["k.bias"][:, None, None]
    y, xx = lr_coordinates(h, height), lr_coordinates(w, width)
    k_up = sample_cells(k, y, xx)

    scores = pcdc_scores(p, "semantic_scores", k_up, guided_filter(q, k_up), stride, groups)
    scores = scores + pcdc_scores(p, "detail_scores", gaussian(q), q, stride, groups)
    reach = KERNEL // 2
    for i in range(KERNEL):
        for j in range(KERNEL):
            rows = torch.arange(height) + (i - reach) * stride
            columns = torch.arange(width) + (j - reach) * stride
            inside = ((rows >= 0) & (rows < height))[:, None] & (columns >= 0) & (columns < width)
            scores[:, i * KERNEL + j].masked_fill_(~inside, float("-inf"))
    weights = scores.softmax(1)

    out = torch.zeros(*x.shape[:2], height, width, dtype=x.dtype)
    for i in range(KERNEL):
        for j in range(KERNEL):
            neighbour = sample_cells(x, y + i - reach, xx + j - reach)
            out += weights[:, i * KERNEL + j, None] * neighbour
    return out, weights
