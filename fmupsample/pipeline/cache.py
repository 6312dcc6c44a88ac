"""Features of a first pass over images, kept for a second one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from fmupsample.errors import FmupsampleError
from fmupsample.images.find import Source
from fmupsample.pipeline.features import FeaturePipeline, Item


class FeatureCache:
    """Items, as far as they fit.

    Args:
        limit: bytes.
    """

    def __init__(self, pipeline: FeaturePipeline, limit: int) -> None:
        self.pipeline, self.left = pipeline, limit
        self._kept: dict[Source, Item] = {}

    def add(self, item: Item) -> None:
        """Keep this item if there is room."""
        size = item.features.numel() * 4 + item.canvas.nbytes
        if size > self.left:
            self.left = 0  # the first images are kept: the second pass goes in the same order
            return
        self.left -= size
        self._kept[item.source] = Item(
            item.source, item.frame, item.canvas, item.features.cpu(), torch.empty(0),
            item.window, item.stamp,
        )  # fmt: skip

    def items(
        self, sources: Sequence[Source], *, on_error: Callable[[Source, FmupsampleError], None]
    ) -> Iterator[Item]:
        """The items of these sources: kept ones first, then those computed again."""
        others = [source for source in sources if source not in self._kept]
        for source in sources:
            if (kept := self._kept.pop(source, None)) is not None:
                kept.features = kept.features.to(self.pipeline.device)
                kept.guidance = self.pipeline.guidance(kept.canvas, kept.window)
                yield kept
        yield from self.pipeline.items(others, on_error=on_error)
