"""Scores of a pixel and the K x K cells around it, and the softmax of them.

A score is the sum of

* place: ``log(1 - (2 d / K)^2)`` along each axis, which ends at nothing where a cell leaves the
  K x K (no seams), and a Gaussian on the distance d from the pixel to the cell's centre, in cells;
* colour: a Gaussian on the difference of the pixel's colour and the cell's mean, as in joint
  bilateral upsampling (Kopf et al. 2007), by a factor that the encoder gives each pixel;
* affinity: the inner product of the pixel's query with the cell's key, plus the cell's bias;
* direction: ``a . d + c . d^2`` with two slopes and two curvatures that the encoder gives each
  pixel: where to look, and how far.

Each of them goes on across the borders of cells: for a pixel near a border it makes no difference
which of the two cells is called its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmupsample.ops.grid import cell_distance, cell_inside
from fmupsample.upsamplers.affinity.config import AffinityConfig
from fmupsample.upsamplers.cells import Window, cell_products

# What the encoder gives each pixel beside its query: the logit of the colour's factor, slopes and
# curvatures down and across.
EXTRAS = 5


def affinity_weights(
    config: AffinityConfig,
    embedding: Tensor,
    image: Tensor,
    keys: Tensor,
    colours: Tensor,
    size: tuple[int, int],
    window: Window,
) -> Tensor:
    """Kernel weights ``[B, K*K, rows, columns]`` of a window.

    Args:
        embedding: ``[B, E + EXTRAS, rows, columns]``, the encoder's, of the window.
        image: ``[B, 3, rows, columns]``, normalised, of the window.
        keys: ``[B, E + 1, h, w]`` of all cells, their biases last.
        colours: ``[B, 3, h, w]``, the mean of the image over each cell.
        size: ``(H, W)`` of the whole map.
    """
    e = config.embedding
    cells = (keys.shape[-2], keys.shape[-1])
    precision = config.sigma_range**-2
    described, factor, slopes, curvatures = embedding.split([e, 1, 2, 2], 1)
    factor = 2 * factor.sigmoid()
    # Of |g - m|^2, the |g|^2 is the same for all cells: the softmax does not see it.
    query = torch.cat([described, factor * image, factor], 1)
    offset = -0.5 * precision * colours.square().sum(1, keepdim=True)
    key = torch.cat([keys[:, :e] * e**-0.5, precision * colours, offset], 1)
    scores = cell_products(query, key, keys[:, e:], config.kernel_size, size, window)
    grid = scores.unflatten(1, (config.kernel_size,) * 2)  # [B, K, K, rows, columns]
    for axis, (n, pixels, part) in enumerate(zip(cells, size, window, strict=True)):
        distance, place = (x[:, part] for x in _axis(config, n, pixels))  # [K, pixels]
        shape = (-1, distance.shape[1], 1) if axis == 0 else (-1, 1, distance.shape[1])
        distance, place = (x.to(scores).view(shape) for x in (distance, place))
        slope, curvature = slopes[:, axis, None], curvatures[:, axis, None]
        along = (curvature * distance + slope) * distance + place  # [B, K, rows, columns]
        grid.add_(along.unsqueeze(2 - axis))
    return scores.softmax(1)


def _axis(config: AffinityConfig, cells: int, pixels: int) -> tuple[Tensor, Tensor]:
    """Distances of the K neighbours along an axis, and what they are worth: ``[K, pixels]`` each.

    Cells that do not exist have distance 0 and are worth ``-inf``.
    """
    reach = config.kernel_size // 2
    distances, places = [], []
    for offset in range(-reach, reach + 1):
        distance = cell_distance(cells, pixels, offset)
        share = distance.square() * (2 / config.kernel_size) ** 2
        place = (1 - share).clamp_min(0).log() - distance.square() / (2 * config.sigma_space**2)
        inside = cell_inside(cells, pixels, offset)
        distances.append(distance.where(inside, 0.0))
        places.append(place.masked_fill(~inside, float("-inf")))
    return torch.stack(distances), torch.stack(places)
