"""Confusion and boundary hits of several probes at once, pooled over all images.

It is another measure than :class:`fmupsample.probing.Segmentation`: boundaries are those between
any two classes, matched within a square and counted over the whole set, and a class that is
nowhere in the truth does not count.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = 255
BAND, TOLERANCE = 5, 3  # pixels


class Judge:
    """Confusion of all pixels and of those near edges, and boundary hits, for some probes."""

    def __init__(self, count: int, classes: int) -> None:
        self.classes = classes
        self.confusion = torch.zeros(count, 2, classes * classes)
        self.hits = torch.zeros(count, 4)

    def add(self, found: Tensor, labels: Tensor) -> None:
        """Classes ``[count, H, W]`` of one image with labels ``[H, W]``."""
        known = labels != IGNORED
        near = _dilated(_edges(labels), BAND) & known
        true = _steps(labels) & known
        near_true = _dilated(true, TOLERANCE)
        for k, own in enumerate(found):
            for part, mask in enumerate((known, near)):
                pairs = labels[mask] * self.classes + own[mask]
                self.confusion[k, part] += torch.bincount(pairs, minlength=self.classes**2)
            said = _steps(own) & known
            near_said = _dilated(said, TOLERANCE)
            counts = (said & near_true).sum(), said.sum(), (true & near_said).sum(), true.sum()
            self.hits[k] += torch.stack(counts)

    def rows(self) -> np.ndarray:
        """``[count, 3]``: mIoU, mIoU near edges, boundary F, in per cent."""
        hit, said, met, true = self.hits.T
        precision, recall = hit / said.clamp_min(1), met / true.clamp_min(1)
        boundary = 200 * precision * recall / (precision + recall).clamp_min(1e-6)
        scores = [[_miou(part.view(self.classes, -1)) for part in own] for own in self.confusion]
        return np.column_stack([scores, boundary.numpy()])

    def foreground(self) -> np.ndarray:
        """``[count]``: IoU of class 1, in per cent."""
        matrix = self.confusion[:, 0].view(-1, self.classes, self.classes)
        union = matrix[:, 1].sum(1) + matrix[:, :, 1].sum(1) - matrix[:, 1, 1]
        return (100 * matrix[:, 1, 1] / union.clamp_min(1)).numpy()


def _miou(matrix: Tensor) -> float:
    there, own = matrix.sum(1) > 0, matrix.diag()
    return (100 * own / (matrix.sum(0) + matrix.sum(1) - own).clamp_min(1))[there].mean().item()


def _steps(labels: Tensor) -> Tensor:
    """Pixels whose neighbour below or to the right is of another class."""
    found = torch.zeros_like(labels, dtype=torch.bool)
    found[:-1] |= labels[1:] != labels[:-1]
    found[:, :-1] |= labels[:, 1:] != labels[:, :-1]
    return found


def _edges(labels: Tensor) -> Tensor:
    """Pixels beside one of another class."""
    found = _steps(labels)
    found[1:] |= labels[1:] != labels[:-1]
    found[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    return found


def _dilated(mask: Tensor, reach: int) -> Tensor:
    return F.max_pool2d(mask[None, None].float(), 2 * reach + 1, 1, reach)[0, 0] > 0
