"""Neighbour scores: paired central difference convolution and its compressor.

For output channel m the paired central difference convolution (PCDC) of a key map and a query map
is ``sum_d W_m[d] . (key(p + s d) - query(p)) + b_m`` over K x K offsets d, s output pixels apart.
The query part does not depend on d, so it is the 1x1 convolution with ``sum_d W_m[d]``; what is
left is an ordinary convolution of the keys.

A ``KeyTerm`` gives that convolution for some rows of the output. Everything after it is local to a
pixel but for one GroupNorm, whose statistics span the picture: so the rows are worked on in strips,
each leaving its moments and, per norm group, its unnormalised share of the scores; the
normalisation is a weighted sum of those shares afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.layers.moments import affine, apply_affine, group_moments, pooled_moments
from fmupsample.ops.grid import interpolation_matrix, plan_axis

# (first row, last row + 1) -> [B, M, rows, W]: the convolution of the keys, plus the bias b.
KeyTerm = Callable[[int, int], Tensor]

# Bytes of one middle-channel strip: on a CPU about the shared cache, on an accelerator plenty.
_STRIP_BYTES = {"cpu": 8 << 20}
_STRIP_BYTES_ACCELERATOR = 512 << 20


class PairedCDC(nn.Module):
    """Parameters of one PCDC branch, and the scores they give.

    Args:
        embedding: channels E of keys and queries.
        middle: channels M between.
        groups: of the convolutions; ``norm_groups``: of the GroupNorms.
        kernel_size: K.
    """

    def __init__(
        self, embedding: int, middle: int, groups: int, norm_groups: int, kernel_size: int
    ):
        super().__init__()
        self.groups = groups
        self.kernel_size = kernel_size
        self.norm = nn.GroupNorm(norm_groups, embedding)  # one affine for keys and queries
        self.difference = nn.Conv2d(embedding, middle, kernel_size, groups=groups)
        self.mix = nn.Conv2d(middle, middle, 1, groups=groups)
        self.mix_norm = nn.GroupNorm(norm_groups, middle)
        self.score = nn.Conv2d(middle, kernel_size**2, 1)

    def key_affine(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift ``[B, E]`` of the shared norm for keys with these moments."""
        return affine(self.norm, mean, variance)

    def upsampled_key_term(
        self, key: Tensor, moments: tuple[Tensor, Tensor], size: tuple[int, int]
    ) -> KeyTerm:
        """The key term for a key map given at low resolution, to be upsampled bilinearly.

        Neighbours s output pixels apart are neighbouring cells at low resolution, so convolving
        there (dilation 1) and upsampling afterwards is the same: with the map replicate-padded
        enough, also at the borders, and at every ratio.

        Args:
            key: ``[B, E, h, w]``; moments: ``[B, norm_groups]`` each, of the *upsampled* key.
        """
        pad = self.kernel_size // 2 + 1
        normal = apply_affine(key, *self.key_affine(*moments))
        padded = F.pad(normal, (pad, pad, pad, pad), mode="replicate")
        low = F.conv2d(padded, self.difference.weight.to(key), groups=self.groups)  # h+2, w+2
        # Rows of interpolation matrices sum to 1: what is added here is added to every pixel.
        low = low + self.difference.bias.to(key)[:, None, None]
        across = low @ interpolation_matrix(key.shape[3], size[1], padding=1).to(key).T
        down = interpolation_matrix(key.shape[2], size[0], padding=1).to(key)
        base = plan_axis(key.shape[2], size[0], True).base + 1

        def term(y0: int, y1: int) -> Tensor:
            first, last = int(base[y0]), int(base[y1 - 1]) + 2
            return down[y0:y1, first:last] @ across[:, :, first:last]

        return term

    def key_term(
        self, key: Tensor, moments: tuple[Tensor, Tensor], stride: tuple[int, int]
    ) -> KeyTerm:
        """The key term for a key map ``[B, E, H, W]`` at full resolution, offsets ``stride`` apart.

        The key's normalisation is folded into the weights.
        """
        scale, shift = self.key_affine(*moments)
        batch = key.shape[0]
        pad_y, pad_x = (s * (self.kernel_size // 2) for s in stride)
        padded = F.pad(key, (pad_x, pad_x, pad_y, pad_y), mode="replicate")
        weight = self.difference.weight.to(key)  # [M, E/groups, K, K]
        per_sample, offset = self._fold(weight.flatten(2), scale, shift)  # [B, M, E/g, KK], [B, M]
        kernel = per_sample.unflatten(3, weight.shape[2:]).flatten(0, 1)
        offset = offset + self.difference.bias.to(key)

        def term(y0: int, y1: int) -> Tensor:
            rows = padded[:, :, y0 : y1 + 2 * pad_y]
            # One convolution for the whole batch: samples become groups.
            out = F.conv2d(
                rows.reshape(1, -1, *rows.shape[2:]),
                kernel,
                offset.flatten(),
                dilation=stride,
                groups=batch * self.groups,
            )
            return out.unflatten(1, (batch, -1)).squeeze(0)

        return term

    def _fold(self, weight: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Fold an input affine ``[B, E]`` into grouped weights ``[M, E/groups, ...]``."""
        grouped = weight.unflatten(0, (self.groups, -1))  # [g, M/g, E/g, ...]
        scale = scale.unflatten(1, (self.groups, 1, -1, 1))
        shift = shift.unflatten(1, (self.groups, 1, -1, 1))
        offset = (grouped * shift).sum((3, 4)).flatten(1)
        return (grouped * scale).flatten(1, 2), offset

    def forward(self, key_term: KeyTerm, query: Tensor) -> Tensor:
        """Scores ``[B, K*K, H, W]`` of a query map ``[B, E, H, W]``."""
        batch, _, height, width = query.shape
        total = self.difference.weight.to(query).flatten(2).sum(2, keepdim=True)  # [M, E/g, 1]
        moments = group_moments(query, self.norm.num_groups)
        weight, offset = self._fold(total, *affine(self.norm, *moments))
        weight = -weight.squeeze(3).unflatten(1, (self.groups, -1)).flatten(0, 1)
        offset = offset.reshape(batch * self.groups, -1, 1)

        parts, moments, counts = [], [], []
        step = self._strip_rows(query)
        for y0 in range(0, height, step):
            y1 = min(y0 + step, height)
            shape = (batch * self.groups, -1, (y1 - y0) * width)
            middle = key_term(y0, y1).reshape(shape)
            middle = middle.baddbmm_(weight, query[:, :, y0:y1].reshape(shape))
            middle = middle.sub_(offset).relu_()
            mixed = self._mix(middle.unflatten(0, (batch, self.groups)))
            moments.append(group_moments(mixed, self.mix_norm.num_groups))
            counts.append((y1 - y0) * width)
            parts.append(self._partial_scores(mixed).unflatten(3, (y1 - y0, width)))
        return self._normalise(parts, pooled_moments(moments, counts))

    def _strip_rows(self, query: Tensor) -> int:
        budget = _STRIP_BYTES.get(query.device.type, _STRIP_BYTES_ACCELERATOR)
        row = query.shape[0] * query.shape[3] * self.mix.in_channels * query.element_size()
        return max(1, budget // row)

    def _mix(self, middle: Tensor) -> Tensor:
        """ReLU(grouped 1x1): ``[B, groups, M/groups, P]`` -> ``[B, M, P]``."""
        weight = self.mix.weight.to(middle).reshape(self.groups, -1, middle.shape[2])
        bias = self.mix.bias.to(middle).reshape(self.groups, -1, 1)
        return (weight @ middle).add_(bias).relu_().flatten(1, 2)

    def _partial_scores(self, mixed: Tensor) -> Tensor:
        """Scores before normalisation, per norm group: ``[B, M, P]`` -> ``[B, G, K*K, P]``."""
        groups = self.mix_norm.num_groups
        weight = self.score.weight.to(mixed).flatten(1) * self.mix_norm.weight.to(mixed)
        weight = weight.unflatten(1, (groups, -1)).transpose(0, 1)  # [G, KK, M/G]
        return weight @ mixed.unflatten(1, (groups, -1))

    def _normalise(self, parts: list[Tensor], moments: tuple[Tensor, Tensor]) -> Tensor:
        """Complete the GroupNorm between ``mix`` and ``score`` on its partial scores."""
        mean, variance = moments  # [B, G]
        groups = self.mix_norm.num_groups
        rstd = (variance + self.mix_norm.eps).rsqrt()
        weight = self.score.weight.to(mean).flatten(1)  # [KK, M]
        gain = (weight * self.mix_norm.weight.to(mean)).unflatten(1, (groups, -1)).sum(2)
        constant = self.score.bias.to(mean) + weight @ self.mix_norm.bias.to(mean)
        constant = constant - (mean * rstd) @ gain.T  # [B, KK]
        strips = []
        for part in parts:
            flat = part.flatten(2)
            total = (
                torch.bmm(rstd[:, None], flat).squeeze(1).reshape(part.shape[0], *part.shape[2:])
            )
            strips.append(total.add_(constant[:, :, None, None]))
        return torch.cat(strips, 2)
