"""Neighbour scores: paired central difference convolution and its compressor.

For output channel m the paired central difference convolution (PCDC) of a key map and a query map
is ``sum_d W_m[d] . (key(p + s d) - query(p)) + b_m`` over K x K offsets d, s output pixels apart.
The query part does not depend on d, so it is the 1x1 convolution with ``sum_d W_m[d]``; what is
left is an ordinary convolution of the keys.

A ``KeyTerm`` gives that convolution for some rows of the output, plus a constant. Everything after
it is local to a pixel but for one GroupNorm, whose statistics span the picture: so the rows are
worked on in strips, each leaving its moments and, per norm group, its unnormalised share of the
scores; the normalisation is a weighted sum of those shares afterwards. On a GPU one kernel does all
of it up to there.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from fmupsample.layers.chunks import recorded
from fmupsample.layers.moments import affine, apply_affine, group_moments, pooled_moments
from fmupsample.upsamplers.aligned.workspace import Workspace
from fmupsample.upsamplers.resfu import fused
from fmupsample.upsamplers.resfu.keys import FullKeys, Keys, UpsampledKeys
from fmupsample.upsamplers.resfu.layers import DifferenceLayers

# Bytes of one middle-channel strip: on a CPU about the shared cache, on an accelerator plenty.
_STRIP_BYTES = {"cpu": 4 << 20}
_STRIP_BYTES_ACCELERATOR = 512 << 20


def _view(buffer: Tensor | None, shape: tuple[int, ...], start: int = 0) -> Tensor | None:
    """A piece of the buffer, or ``None`` (make your own) where there is none."""
    return None if buffer is None else buffer[start : start + prod(shape)].view(shape)


class PairedCDC(DifferenceLayers):
    """The layers of one PCDC branch, and the scores they give."""

    def key_affine(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift ``[B, E]`` of the shared norm for keys with these moments."""
        return affine(self.norm, mean, variance)

    def upsampled_keys(
        self, key: Tensor, moments: tuple[Tensor, Tensor], size: tuple[int, int]
    ) -> Keys:
        """The keys given as a map at low resolution, to be upsampled bilinearly.

        Args:
            key: ``[B, E, h, w]``; moments: ``[B, norm_groups]`` each, of the *upsampled* key.
        """
        pad = self.kernel_size // 2 + 1
        normal = apply_affine(key, *self.key_affine(*moments))
        padded = F.pad(normal, (pad, pad, pad, pad), mode="replicate")
        low = F.conv2d(padded, self.difference.weight.to(key), groups=self.groups)  # h+2, w+2
        return UpsampledKeys(low, size)

    def full_keys(
        self, key: Tensor, moments: tuple[Tensor, Tensor], stride: tuple[int, int]
    ) -> Keys:
        """The keys given as a map ``[B, E, H, W]`` at full resolution, ``stride`` pixels apart.

        The key's normalisation is folded into the weights.
        """
        weight = self.difference.weight.to(key)  # [M, E/groups, K, K]
        per_sample, offset = self._fold(weight.flatten(2), *self.key_affine(*moments))
        per_sample = per_sample.unflatten(3, weight.shape[2:])
        return FullKeys(key, per_sample, offset, self.groups, stride)

    def _fold(self, weight: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Fold an input affine ``[B, E]`` into grouped weights ``[M, E/groups, ...]``."""
        grouped = weight.unflatten(0, (self.groups, -1))  # [g, M/g, E/g, ...]
        scale = scale.unflatten(1, (self.groups, 1, -1, 1))
        shift = shift.unflatten(1, (self.groups, 1, -1, 1))
        offset = (grouped * shift).sum((3, 4)).flatten(1)
        return (grouped * scale).flatten(1, 2), offset

    def forward(self, keys: Keys, query: Tensor, workspace: Workspace) -> Tensor:
        """Scores ``[B, K*K, H, W]`` of a query map ``[B, E, H, W]``.

        In low precision, on a CPU and without gradients, products up to the last norm are bfloat16.
        """
        moments = group_moments(query, self.norm.num_groups)
        return self.complete(*self.partial(keys, query, moments, workspace))

    def partial(
        self,
        keys: Keys,
        query: Tensor,
        query_moments: tuple[Tensor, Tensor],
        workspace: Workspace,
    ) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        """Everything before the last norm: its input's shares of the scores, and its moments.

        :meth:`complete` makes scores of them, with these moments or, where this is a window of a
        larger map, with those of the whole.
        """
        total = self.difference.weight.to(query).flatten(2).sum(2, keepdim=True)  # [M, E/g, 1]
        weight, offset = self._fold(total, *affine(self.norm, *query_moments))
        weight, constant = -weight.squeeze(3), self.difference.bias.to(query) - offset
        if fused.serves(self, keys, query):
            part, moments = fused.partial_scores(self, keys, query, weight, constant)
            return [part], moments
        # Where nobody looks on, strips reuse their memory.
        reuse = not recorded(query, keys.source, *self.parameters())
        low = workspace.low_precision and reuse and query.device.type == "cpu"
        strips = self._strips(keys, query, weight, constant, workspace, reuse, low)
        parts, moments, counts = zip(*strips, strict=True)
        return list(parts), pooled_moments(list(moments), list(counts))

    def _strips(
        self,
        keys: Keys,
        query: Tensor,
        weight: Tensor,
        constant: Tensor,
        workspace: Workspace,
        reuse: bool,
        low: bool,
    ) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor], int]]:
        """Per strip of rows: its partial scores, its moments, and its number of pixels."""
        batch, _, height, width = query.shape
        dtype = torch.bfloat16 if low else query.dtype
        weight = weight.unflatten(1, (self.groups, -1)).flatten(0, 1).to(dtype)
        key_term = keys.term(constant, dtype)
        mix_weight, mix_bias, score_weight = self._weights_after(query)
        mix_weight, mix_bias = mix_weight.to(dtype), mix_bias.to(dtype)

        middles, step = batch * self.mix.in_channels, min(self._strip_rows(query), height)
        partials = len(score_weight) * score_weight.shape[1]
        space = mixed_space = full_space = part_space = None
        if reuse:
            strip = middles * step * width
            space, mixed_space = (workspace.reserve(n, strip, weight) for n in ("middle", "mixed"))
            full_space = workspace.reserve("full", strip, query) if low else None
            part_space = workspace.reserve("parts", partials * height * width, query)
        for y0 in range(0, height, step):
            y1 = min(y0 + step, height)
            pixels = (y1 - y0) * width
            shape = (len(mix_weight), -1, pixels)
            middle = key_term(y0, y1, _view(space, (middles, y1 - y0, width))).reshape(shape)
            rows = query[:, :, y0:y1].to(dtype).reshape(shape)
            middle = middle.baddbmm_(weight, rows).relu_()
            mixed = torch.bmm(mix_weight, middle, out=_view(mixed_space, middle.shape))
            mixed = mixed.add_(mix_bias).relu_()
            if low:
                mixed = _view(full_space, mixed.shape).copy_(mixed)
            mixed = mixed.view(len(score_weight), -1, pixels)
            place = _view(part_space, (*score_weight.shape[:2], pixels), partials * y0 * width)
            part = torch.bmm(score_weight, mixed, out=place)  # [B G, K*K, P]
            mixed = mixed.view(batch, -1, pixels)
            moments = group_moments(mixed, self.mix_norm.num_groups, overwrite=reuse)
            yield part.unflatten(0, (batch, -1)).unflatten(3, (y1 - y0, width)), moments, pixels

    def _strip_rows(self, query: Tensor) -> int:
        budget = _STRIP_BYTES.get(query.device.type, _STRIP_BYTES_ACCELERATOR)
        row = query.shape[0] * query.shape[3] * self.mix.in_channels * query.element_size()
        return max(1, budget // row)

    def _weights_after(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the grouped 1x1, ``[B groups, M/groups, M/groups]`` and ``[B groups, M/groups, 1]``,
        and of the scores before normalisation, per norm group: ``[B G, K*K, M/G]``.
        """
        batch, groups = len(query), self.mix_norm.num_groups
        mix = self.mix.weight.to(query).reshape(self.groups, -1, self.mix.weight.shape[1])
        bias = self.mix.bias.to(query).reshape(self.groups, -1, 1)
        score = self.score.weight.to(query).flatten(1) * self.mix_norm.weight.to(query)
        score = score.unflatten(1, (groups, -1)).transpose(0, 1)  # [G, KK, M/G]
        return mix.repeat(batch, 1, 1), bias.repeat(batch, 1, 1), score.repeat(batch, 1, 1)

    def complete(self, parts: list[Tensor], moments: tuple[Tensor, Tensor]) -> Tensor:
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
