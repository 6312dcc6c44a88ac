"""Keys that lean on no channel: a random projection of standardised features.

Every channel is first brought to mean 0 and variance 1 over the picture, whatever its scale and
sign. An orthogonal projection to E channels then keeps distances between cells on average (Johnson
and Lindenstrauss 1984), whatever C is. A head that sees another projection at every step of its
training cannot learn what a channel means, only what distances do: so it serves any features.
"""

from __future__ import annotations

from functools import lru_cache, reduce

import numpy as np
import torch
from torch import Tensor, nn

_SEED = 0
# Channels that vary less than this, relative to their size, are constant but for rounding.
_FAINTEST = 1e-5
_CHUNK_BYTES = 128 << 20


class Projection(nn.Module):
    """``[B, C, h, w]`` -> ``[B, E, h, w]``.

    Args:
        channels: C; the projection is a parameter ``weight`` ``[E, C]``, which training changes. 0:
            there is no parameter and C is any number; in training mode the projection is a new one
            at every call, else that of a fixed seed.
        embedding: E.
    """

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.embedding = embedding
        weight = None
        if channels:
            weight = nn.Parameter(random_projection(channels, embedding, _SEED).float())
        self.register_parameter("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        weight, channels = self.weight, x.shape[1]
        if weight is None and self.training:
            # Of PyTorch's own random numbers, so that a run that goes on draws as it would have.
            weight = random_projection(channels, self.embedding, int(torch.randint(2**31, ())))
        elif weight is None:
            weight = _fixed_projection(channels, self.embedding)
        return project(x, weight.to(x))


def project(x: Tensor, weight: Tensor) -> Tensor:
    """Standardise the channels of each picture, then project: ``[B, C, h, w]`` and ``[E, C]``."""
    flat = x.flatten(2)
    if torch.compiler.is_compiling():
        return _project(flat, weight).unflatten(2, x.shape[2:])
    # All at once, but for features so large that copies of them matter.
    step = max(1, _CHUNK_BYTES // max(1, flat[:, :1].nbytes))
    parts = zip(flat.split(step, 1), weight.split(step, 1), strict=True)
    return reduce(torch.add, (_project(*part) for part in parts)).unflatten(2, x.shape[2:])


def _project(flat: Tensor, weight: Tensor) -> Tensor:
    """The share of some channels, ``[B, c, n]`` and ``[E, c]`` -> ``[B, E, n]``."""
    mean = flat.mean(2, keepdim=True)
    centred = flat - mean
    variance = centred.square().mean(2)
    floor = _FAINTEST**2 * (variance + mean.squeeze(2).square())
    gain = (variance + floor + torch.finfo(flat.dtype).tiny).rsqrt()  # [B, c]
    return (weight * gain[:, None]) @ centred


def random_projection(channels: int, embedding: int, seed: int) -> Tensor:
    """``[E, C]``, float64: rows orthonormal, or columns where there are fewer of them.

    The same on every machine and in every version: the generator is one that NumPy keeps as it is.
    """
    long, short = max(channels, embedding), min(channels, embedding)
    normal = np.random.RandomState(seed).standard_normal((long, short))
    q, r = np.linalg.qr(normal)
    q *= np.where(np.diagonal(r) < 0, -1.0, 1.0)  # else what the signs are is up to LAPACK
    return torch.from_numpy(q.T if channels >= embedding else q).contiguous()


@torch.compiler.assume_constant_result
def _fixed_projection(channels: int, embedding: int) -> Tensor:
    return _remembered_projection(channels, embedding)


@lru_cache(maxsize=64)
def _remembered_projection(channels: int, embedding: int) -> Tensor:
    return random_projection(channels, embedding, _SEED)
