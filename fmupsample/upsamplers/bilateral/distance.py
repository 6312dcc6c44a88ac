"""Scores of whole cells by distance: how a pixel's query differs from what a cell is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fmupsample.layers.moments import group_moments
from fmupsample.upsamplers.cells import WHOLE, Window, cell_products

# Scores are means over the channels times this: of a size that training reaches in some dozens of
# steps.
_GAIN = 8.0


class CellDistance(nn.Module):
    """``-8 mean_e w_e (q_e - k_e)^2`` of normalised queries and keys, up to what is the same for
    all neighbours of a pixel. ``w`` begins at 0.

    Args:
        embedding: E; norm_groups: of the normalisation, which has no parameters.
        shared: one weight for all channels, for keys whose channels mean nothing.
    """

    def __init__(self, embedding: int, norm_groups: int, kernel_size: int, *, shared: bool) -> None:
        super().__init__()
        self.norm_groups, self.kernel_size = norm_groups, kernel_size
        self.weight = nn.Parameter(torch.zeros(1 if shared else embedding))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        size: tuple[int, int],
        window: Window = WHOLE,
        moments: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Scores ``[B, K*K, rows, columns]`` of the window.

        Args:
            query: ``[B, E, rows, columns]`` of the window; key: ``[B, E, h, w]`` of all cells.
            size: ``(H, W)`` of the whole map.
            moments: of the queries of the whole map, where this is a window.
        """
        mean, gain = self._normalisation(query, moments)
        key_mean, key_gain = self._normalisation(key)
        key = (key - key_mean) * key_gain
        # The query's normalisation is folded into the keys, which are few.
        weighted = key * (self.weight.to(key)[:, None, None] * _GAIN / key.shape[1])
        offset = -(weighted * (key + 2 * mean * gain)).sum(1, keepdim=True)
        return cell_products(query, 2 * weighted * gain, offset, self.kernel_size, size, window)

    def _normalisation(
        self, x: Tensor, moments: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """What to subtract and then to multiply by, ``[B, E, 1, 1]`` each."""
        mean, variance = group_moments(x, self.norm_groups) if moments is None else moments
        each = x.shape[1] // self.norm_groups
        return tuple(
            part.repeat_interleave(each, 1)[:, :, None, None]
            for part in (mean, (variance + 1e-5).rsqrt())
        )
