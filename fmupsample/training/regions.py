"""The regions of a picture: pixels that belong together by colour, found by merging along a graph.

Felzenszwalb & Huttenlocher, "Efficient Graph-Based Image Segmentation" (2004): neighbouring pixels
are joined by edges as heavy as their colours differ. The edges are taken lightest first, and two
regions merge over an edge that is not heavier than what holds either of them together, plus an
allowance that shrinks as they grow.

Taken one by one, that is slow in Python. But an edge that is the lightest one of *both* regions at
its ends is decided the same way whenever it is taken: nothing lighter can change either of them
before. And a region whose lightest edge is too heavy for it never changes again. So all regions
decide at once, round after round, with the result of the paper's loop; the last few edges, which
would take many small rounds, are taken one by one.

The graph is made of a picture of half the size, a quarter of the work, and the borders are then
moved to where the colours change at full size.
"""

from __future__ import annotations

import cv2
import numpy as np

# On a picture of half the size; chosen by looking, and by likeness to what scale 80, sigma 0.6 and
# 30 pixels give at full size.
_SCALE, _SIGMA, _MIN_SIZE = 60.0, 0.6, 8
# Edges are worked on a few at a time: most are inside a region by the time they would be looked at.
_BATCH = 1 << 14
# Fewer than these are taken one by one.
_FEW = 1000

Edges = tuple[np.ndarray, np.ndarray, np.ndarray]  # both ends int32, weight float32


def find_regions(picture: np.ndarray) -> np.ndarray:
    """Regions of a picture uint8 ``[H, W, 3]``.

    Returns:
        int32 ``[H, W]``, numbers from 0. The same picture gives the same regions.
    """
    height, width = picture.shape[:2]
    even = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    half = (even.shape[1] // 2, even.shape[0] // 2)
    small = cv2.resize(even, half, interpolation=cv2.INTER_AREA)
    regions = merge_regions(small, scale=_SCALE, sigma=_SIGMA, min_size=_MIN_SIZE)
    regions = regions.repeat(2, 0).repeat(2, 1)[:height, :width]
    return _move_borders(picture, np.ascontiguousarray(regions))


def merge_regions(picture: np.ndarray, *, scale: float, sigma: float, min_size: int) -> np.ndarray:
    """The method itself, without the shortcut through a smaller picture.

    Args:
        picture: uint8 ``[H, W, 3]``.
        scale: the allowance; larger gives larger regions.
        sigma: of a Gaussian that smooths the picture first, pixels.
        min_size: regions of fewer pixels are merged into the neighbour most alike.

    Returns:
        int32 ``[H, W]``, numbers from 0 without gaps, in the order of first appearance.
    """
    smooth = picture.astype(np.float32)
    if sigma > 0:
        smooth = cv2.GaussianBlur(smooth, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
    forest = _Forest(picture.shape[0] * picture.shape[1], scale)
    a, b, weight = _edges(smooth)
    left = []
    for start in range(0, len(a), _BATCH):
        batch = slice(start, start + _BATCH)
        left.append(forest.merge(a[batch], b[batch], weight[batch]))
    if left:
        forest.absorb(*(np.concatenate(part) for part in zip(*left, strict=True)), min_size)
    return forest.numbers().reshape(picture.shape[:2])


def _edges(smooth: np.ndarray) -> Edges:
    """Every edge of the picture, lightest first."""
    height, width = smooth.shape[:2]
    index = np.arange(height * width, dtype=np.int32).reshape(height, width)
    a, b, weights = [], [], []
    # Each pixel and its neighbours to the right, below, and on both diagonals below.
    for here, there in (
        (np.s_[:, :-1], np.s_[:, 1:]),
        (np.s_[:-1], np.s_[1:]),
        (np.s_[:-1, :-1], np.s_[1:, 1:]),
        (np.s_[:-1, 1:], np.s_[1:, :-1]),
    ):
        difference = smooth[here] - smooth[there]
        weights.append(np.sqrt(np.einsum("yxc,yxc->yx", difference, difference)).ravel())
        a.append(index[here].ravel())
        b.append(index[there].ravel())
    weight = np.concatenate(weights)
    # Colours differ by 442 at most: steps of 1/128 are fine enough, and 16 bits sort by radix.
    order = np.argsort((weight * 128).astype(np.uint16), kind="stable")
    return np.concatenate(a)[order], np.concatenate(b)[order], weight[order]


class _Forest:
    """Regions as trees of nodes; a region's number is that of its root, its first pixel.

    Attributes:
        root: of each node; exact for roots, out of date below them until :meth:`find`.
        size: pixels of each region.
        inner: the heaviest edge by which each region was joined.
    """

    def __init__(self, count: int, scale: float) -> None:
        self.scale = scale
        self.root = np.arange(count, dtype=np.int32)
        self.size = np.ones(count, dtype=np.float32)
        self.inner = np.zeros(count, dtype=np.float32)
        self._lightest = np.empty(count, dtype=np.int32)

    def find(self) -> np.ndarray:
        """The region of every node."""
        while True:
            above = self.root[self.root]
            if np.array_equal(above, self.root):
                return above
            self.root = above

    def numbers(self) -> np.ndarray:
        """The region of every node, numbered from 0 without gaps."""
        root = self.find()
        return (np.cumsum(root == np.arange(len(root)), dtype=np.int32) - 1)[root]

    def merge(self, a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> Edges:
        """Take edges, lightest first and none lighter than those before.

        Returns:
            those that lead from one region to another in the end, perhaps along with others.
        """
        root = self.find()
        a, b = root[a], root[b]
        refused = []
        while True:
            apart = a != b
            a, b, weight = a[apart], b[apart], weight[apart]
            if len(a) < _FEW:
                refused.append(self._merge_one_by_one(a, b, weight))
                return tuple(np.concatenate(part) for part in zip(*refused, strict=True))
            lightest_a, lightest_b = self._is_lightest(a, b)
            heavy_a = weight > self.inner[a] + self.scale / self.size[a]
            heavy_b = weight > self.inner[b] + self.scale / self.size[b]
            join = lightest_a & lightest_b & ~(heavy_a | heavy_b)
            # A region whose lightest edge is too heavy for it is complete, and so are its edges.
            complete = np.concatenate([a[lightest_a & heavy_a], b[lightest_b & heavy_b]])
            keep = ~join
            if len(complete):
                self._lightest[complete] = -1
                closed = (self._lightest[a] == -1) | (self._lightest[b] == -1)
                refused.append((a[closed], b[closed], weight[closed]))
                keep &= ~closed
            self._join(a[join], b[join], weight[join])
            a, b, weight = self.root[a[keep]], self.root[b[keep]], weight[keep]

    def absorb(self, a: np.ndarray, b: np.ndarray, weight: np.ndarray, min_size: int) -> None:
        """Give every region of fewer pixels than ``min_size`` to the neighbour most alike."""
        order = np.argsort(weight, kind="stable")
        root = self.find()
        a, b, weight = root[a[order]], root[b[order]], weight[order]
        while True:
            wanted = (a != b) & (np.minimum(self.size[a], self.size[b]) < min_size)
            a, b, weight = a[wanted], b[wanted], weight[wanted]
            if not len(a):
                return
            lightest_a, lightest_b = self._is_lightest(a, b)
            join = lightest_a & lightest_b
            self._join(a[join], b[join], weight[join])
            a, b = self.root[a], self.root[b]

    def _is_lightest(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whether each edge is the first, and so the lightest, of the region at either end."""
        number = np.arange(len(a), dtype=np.int32)
        # Of repeated places the last assignment stays: both ends in turn, heaviest edge first.
        places = np.stack([a[::-1], b[::-1]], 1).ravel()
        self._lightest[places] = np.repeat(number[::-1], 2)
        return self._lightest[a] == number, self._lightest[b] == number

    def _join(self, a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> None:
        """Merge pairs of regions, each region in one pair at most."""
        low, high = np.minimum(a, b), np.maximum(a, b)
        self.root[high] = low
        self.size[low] += self.size[high]
        self.inner[low] = np.maximum(np.maximum(self.inner[low], self.inner[high]), weight)

    def _merge_one_by_one(self, a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> Edges:
        """The paper's loop; returns the edges it refuses."""
        nodes = np.unique(np.concatenate([a, b]))
        root = dict(zip(nodes.tolist(), nodes.tolist(), strict=True))
        size = dict(zip(root, self.size[nodes].tolist(), strict=True))
        inner = dict(zip(root, self.inner[nodes].tolist(), strict=True))

        def find(node: int) -> int:
            while root[node] != node:
                root[node] = root[root[node]]
                node = root[node]
            return node

        refused = []
        for edge, (x, y, w) in enumerate(zip(a.tolist(), b.tolist(), weight.tolist(), strict=True)):
            x, y = find(x), find(y)
            if x == y:
                continue
            if w > inner[x] + self.scale / size[x] or w > inner[y] + self.scale / size[y]:
                refused.append(edge)
                continue
            x, y = min(x, y), max(x, y)
            root[y] = x
            size[x] += size[y]
            inner[x] = w
        self.root[nodes] = list(root.values())
        self.size[nodes] = list(size.values())
        self.inner[nodes] = list(inner.values())
        return a[refused], b[refused], weight[refused]


def _move_borders(picture: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """Give each pixel beside a border to the region beside it whose mean colour is nearest."""
    height, width = regions.shape
    flat, colours = regions.ravel(), picture.reshape(-1, 3)
    size = np.bincount(flat)
    sums = [np.bincount(flat, colours[:, c]) for c in range(3)]
    mean = (np.stack(sums, 1) / size[:, None]).astype(np.float32)
    padded = np.pad(regions, 1, mode="edge")
    beside = [
        padded[1 + y : 1 + y + height, 1 + x : 1 + x + width]
        for y, x in ((0, 1), (0, -1), (1, 0), (-1, 0))
    ]
    pixels = np.flatnonzero(np.logical_or.reduce([view != regions for view in beside]))
    colour = colours[pixels].astype(np.float32)
    candidates = np.stack([flat[pixels], *(view.ravel()[pixels] for view in beside)])
    best, nearest = candidates[0].copy(), np.full(len(pixels), np.inf, dtype=np.float32)
    for candidate in candidates:
        difference = colour - mean[candidate]
        distance = np.einsum("nc,nc->n", difference, difference)
        np.copyto(best, candidate, where=distance < nearest)
        np.minimum(nearest, distance, out=nearest)
    moved = flat.copy()
    moved[pixels] = best
    return moved.reshape(height, width)
