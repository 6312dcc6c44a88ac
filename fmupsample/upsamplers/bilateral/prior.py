"""What place and colour of a cell say before anything is learned.

Logarithms of weights by place (:mod:`~fmupsample.upsamplers.places`) and by colour, as in joint
bilateral upsampling (Kopf et al. 2007). By colour: a Gaussian on how the pixel differs from the
mean over the cell. Of ``|g - m|^2`` the ``|g|^2`` is the same for all neighbours: the softmax does
not see it.
"""

from __future__ import annotations

from torch import Tensor

from fmupsample.layers.parts import InParts, cell_means
from fmupsample.upsamplers.bilateral.config import BilateralCellsConfig
from fmupsample.upsamplers.cells import WHOLE, Window, cell_products
from fmupsample.upsamplers.places import Places


class BilateralPrior:
    """Added to the scores of a map, or of windows of it.

    Args:
        guidance: ``[B, 3, H, W]``, the whole image; cells: ``(h, w)``.
    """

    def __init__(
        self, config: BilateralCellsConfig, guidance: Tensor | InParts, cells: tuple[int, int]
    ) -> None:
        self.kernel_size, self.guidance = config.kernel_size, guidance
        self.size = (guidance.shape[-2], guidance.shape[-1])
        self.places = Places(
            config.kernel_size, cells, self.size, taper=config.taper, sigma=config.sigma_space
        )
        self.colours: Tensor | None = None
        if config.sigma_range is not None:
            mean = cell_means(guidance, cells)
            self.colours = mean / config.sigma_range**2
            self.offset = -0.5 * (self.colours * mean).sum(1, keepdim=True)

    def add(self, scores: Tensor, window: Window = WHOLE) -> Tensor:
        """``scores`` ``[B, K*K, rows, columns]`` of the window, changed in place."""
        self.places.add(scores, window)
        if self.colours is not None:
            guidance = self.guidance[(..., *window)]
            cell_products(
                guidance, self.colours, self.offset, self.kernel_size, self.size, window,
                onto=scores,
            )  # fmt: skip
        return scores
