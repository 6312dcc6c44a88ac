"""The parameters of one branch of paired central difference convolutions."""

from __future__ import annotations

from torch import nn


class DifferenceLayers(nn.Module):
    """From keys and queries to K x K scores.

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
