"""How good a segmentation is: counted over a whole set, one picture at a time.

All of it works on label maps: integers ``[H, W]``, classes from 0, and one value (255) for pixels
that are not judged.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch
from torch import Tensor

from fmupsample.errors import ShapeError, UsageError

IGNORE = 255


class Confusion:
    """Counts of (true, predicted) classes of all pixels of a set.

    Args:
        classes: their number.
        ignore: label of pixels that count nowhere.
    """

    def __init__(self, classes: int, ignore: int = IGNORE) -> None:
        self.ignore = ignore
        self.matrix = torch.zeros(classes, classes, dtype=torch.int64)  # [true, predicted]

    def add(self, predicted: Tensor, target: Tensor) -> None:
        """Count one picture: integers, both ``[H, W]``.

        Raises:
            ShapeError: of different sizes.
            UsageError: a label that is neither a class nor ``ignore``.
        """
        _check_sizes(predicted, target)
        classes = len(self.matrix)
        keep = target != self.ignore
        target, predicted = target[keep].long(), predicted[keep].long()
        for what, labels in (("label", target), ("prediction", predicted)):
            if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
                wrong = labels[(labels < 0) | (labels >= classes)][0]
                raise UsageError(
                    f"{what} {int(wrong)} is none of the {classes} classes 0..{classes - 1} "
                    f"(ignored: {self.ignore})"
                )
        pairs = torch.bincount(target * classes + predicted, minlength=classes**2)
        self.matrix += pairs.view(classes, classes).cpu()

    def iou(self) -> Tensor:
        """Intersection over union per class, float64 ``[classes]``.

        NaN for a class that is neither in the ground truth nor predicted.
        """
        hit = self.matrix.diag().double()
        return hit / (self.matrix.sum(0) + self.matrix.sum(1) - hit)

    def miou(self) -> float:
        """Mean over the classes that are in the ground truth or predicted; NaN without any.

        A class that is only predicted counts as 0.
        """
        return self.iou().nanmean().item()

    score = miou  # of a choice of learning rates

    def pixel_accuracy(self) -> float:
        """Share of the counted pixels that are right; NaN without any."""
        return (self.matrix.diag().sum().double() / self.matrix.sum()).item()


def edge_band(labels: Tensor, radius: int, ignore: int = IGNORE) -> Tensor:
    """Bool ``[H, W]``: pixels around which a square of ``2 radius + 1`` holds two classes.

    Ignored pixels are no class, and never in the band: the border of an unlabelled area is no edge.
    """
    values = labels.cpu().numpy().astype(np.int32)
    judged = values != ignore
    window = np.ones((2 * radius + 1, 2 * radius + 1), np.uint8)
    # float32 holds integers below 2**24 exactly, and is a type that OpenCV dilates.
    high = cv2.dilate(np.where(judged, values, -1).astype(np.float32), window)
    low = cv2.erode(np.where(judged, values, 2**23).astype(np.float32), window)
    return torch.from_numpy((high > low) & judged).to(labels.device)


def tolerance_pixels(tolerance: float, size: tuple[int, int]) -> int:
    """``tolerance`` in whole pixels: below 1 a share of the diagonal, rounded up."""
    if tolerance <= 0:
        raise UsageError(f"boundary tolerance {tolerance} is not possible: it must be above 0")
    return round(tolerance) if tolerance >= 1 else math.ceil(tolerance * math.hypot(*size))


class BoundaryF:
    """How well predicted contours lie on the true ones, per class.

    The contour of a class is where one of two neighbouring pixels (to the right, below, or both) is
    in it and the other is not, both being judged. A contour pixel is matched if the other map has
    one within the tolerance (Euclidean; found by dilation with a disk). Precision is the share of
    predicted contour pixels that are matched, recall that of true ones, and F their harmonic mean:
    the measure of DAVIS (Perazzi et al., 2016).

    F is taken per picture and class; a class's F is the mean over the pictures where it has a
    contour in the ground truth or in the prediction (a contour in one of them only: 0), and the
    result is the mean over the classes that have one anywhere.

    Args:
        tolerance: in pixels if at least 1, else a share of the picture's diagonal, rounded up to
            whole pixels (0.0075 as in DAVIS: 8 pixels at 854 x 480).
    """

    def __init__(self, classes: int, ignore: int = IGNORE, tolerance: float = 0.0075) -> None:
        tolerance_pixels(tolerance, (1, 1))
        self.ignore, self.tolerance = ignore, tolerance
        self.sums = torch.zeros(classes, dtype=torch.float64)
        self.pictures = torch.zeros(classes, dtype=torch.int64)

    def add(self, predicted: Tensor, target: Tensor) -> None:
        """Count one picture: integers, both ``[H, W]``."""
        scores = self.of(predicted, target)
        present = ~scores.isnan()
        self.sums[present] += scores[present]
        self.pictures += present

    def of(self, predicted: Tensor, target: Tensor) -> Tensor:
        """F per class of one picture, float64 ``[classes]``; NaN where there is no contour."""
        _check_sizes(predicted, target)
        true, guess = target.cpu().numpy(), predicted.cpu().numpy()
        judged = true != self.ignore
        disk = _disk(tolerance_pixels(self.tolerance, true.shape))
        scores = torch.full((len(self.sums),), math.nan, dtype=torch.float64)
        present = np.union1d(np.unique(true[judged]), np.unique(guess[judged]))
        for c in present[present < len(scores)].tolist():
            wanted, found = contour(true == c, judged), contour(guess == c, judged)
            if wanted.any() or found.any():
                scores[c] = _f_measure(wanted, found, disk)
        return scores

    def f(self) -> Tensor:
        """F per class over the set, float64 ``[classes]``; NaN for classes without a contour."""
        return self.sums / self.pictures

    def mean(self) -> float:
        """Mean over classes with a contour; NaN without any."""
        return self.f().nanmean().item()


def contour(mask: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """Pixels ``[H, W]`` that differ from the one to the right, below, or right below them.

    Pairs with a pixel that is not judged do not count.
    """
    edge = np.zeros_like(mask)
    for dy, dx in ((0, 1), (1, 0), (1, 1)):
        here = (slice(0, mask.shape[0] - dy), slice(0, mask.shape[1] - dx))
        there = (slice(dy, None), slice(dx, None))
        edge[here] |= (mask[here] != mask[there]) & judged[here] & judged[there]
    return edge


def _f_measure(wanted: np.ndarray, found: np.ndarray, disk: np.ndarray) -> float:
    if not wanted.any() or not found.any():
        return 0.0
    near_wanted = cv2.dilate(wanted.astype(np.uint8), disk)
    near_found = cv2.dilate(found.astype(np.uint8), disk)
    precision = near_wanted[found].mean()
    recall = near_found[wanted].mean()
    both = precision + recall
    return float(2 * precision * recall / both) if both else 0.0


def _disk(radius: int) -> np.ndarray:
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return (y**2 + x**2 <= radius**2).astype(np.uint8)


class Segmentation:
    """Everything that is reported about segmentations of a set, counted together.

    Args:
        band: radius, in pixels, of the band around label edges in which mIoU is taken as well.
        tolerance: of :class:`BoundaryF`.
    """

    def __init__(
        self, classes: int, ignore: int = IGNORE, *, band: int = 5, tolerance: float = 0.0075
    ) -> None:
        self.ignore, self.band = ignore, band
        self.whole = Confusion(classes, ignore)
        self.near = Confusion(classes, ignore)
        self.boundary = BoundaryF(classes, ignore, tolerance)

    def add(self, predicted: Tensor, target: Tensor) -> None:
        """Count one picture: integers, both ``[H, W]``."""
        self.whole.add(predicted, target)
        band = edge_band(target, self.band, self.ignore)
        self.near.add(predicted, target.masked_fill(~band, self.ignore))
        self.boundary.add(predicted, target)

    def summary(self) -> dict[str, object]:
        """Shares in 0..1, ``None`` for classes that do not occur, ready for JSON."""
        return {
            "miou": _number(self.whole.miou()),
            "band_miou": _number(self.near.miou()),
            "boundary_f": _number(self.boundary.mean()),
            "pixel_accuracy": _number(self.whole.pixel_accuracy()),
            "iou": [_number(v) for v in self.whole.iou().tolist()],
            "boundary_f_per_class": [_number(v) for v in self.boundary.f().tolist()],
        }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)


def _check_sizes(predicted: Tensor, target: Tensor) -> None:
    if predicted.ndim != 2 or predicted.shape != target.shape:
        raise ShapeError(
            f"a prediction and its labels are two maps [H, W] of one size, got "
            f"{list(predicted.shape)} and {list(target.shape)}"
        )
