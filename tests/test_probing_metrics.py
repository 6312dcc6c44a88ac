"""Counts over a set, against slow literal definitions and cases known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fmupsample.errors import ShapeError, UsageError
from fmupsample.probing import BoundaryF, Confusion, Segmentation, edge_band
from fmupsample.probing.metrics import contour, tolerance_pixels

CLASSES = 4


def blobs(seed: int, size=(17, 23), ignored=True) -> torch.Tensor:
    """Labels with areas of a few pixels, some of them ignored; class 3 is rare."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 30, (1, 1, 5, 6), generator=generator)
    coarse = (coarse % 3).where(coarse < 27, torch.tensor(3 if not ignored else 255))
    coarse = coarse.where(coarse != 255, torch.tensor([3, 255])[coarse.sum() % 2])
    return torch.nn.functional.interpolate(coarse.float(), size)[0, 0].long()


def noisy(target: torch.Tensor, seed: int) -> torch.Tensor:
    """A prediction that is right in most places."""
    generator = torch.Generator().manual_seed(seed)
    other = torch.randint(0, CLASSES, target.shape, generator=generator)
    keep = torch.rand(target.shape, generator=generator) < 0.8
    return target.where(keep & (target != 255), other)


PAIRS = [(noisy(blobs(s), s + 50), blobs(s)) for s in range(6)]


def test_confusion_counts_the_whole_set():
    confusion, hits, unions = Confusion(CLASSES), [0] * CLASSES, [0] * CLASSES
    right = total = 0
    for predicted, target in PAIRS:
        confusion.add(predicted, target)
        for p, t in zip(predicted.flatten().tolist(), target.flatten().tolist(), strict=True):
            if t == 255:
                continue
            total, right = total + 1, right + (p == t)
            for c in range(CLASSES):
                hits[c] += p == c and t == c
                unions[c] += p == c or t == c
    assert confusion.matrix.dtype == torch.int64 and confusion.matrix.sum() == total
    expected = [h / u for h, u in zip(hits, unions, strict=True)]
    assert confusion.iou().tolist() == pytest.approx(expected, abs=1e-15)
    assert confusion.miou() == pytest.approx(np.mean(expected))
    assert confusion.pixel_accuracy() == pytest.approx(right / total)


def test_classes_that_do_not_occur_are_left_out_of_the_mean():
    confusion = Confusion(4)
    # Class 2 is only predicted: 0. Class 3 is nowhere: not counted.
    confusion.add(torch.tensor([[0, 0, 1, 2]]), torch.tensor([[0, 0, 1, 1]], dtype=torch.uint8))
    assert confusion.iou().tolist()[:3] == [1.0, 0.5, 0.0] and confusion.iou()[3].isnan()
    assert confusion.miou() == 0.5
    empty = Confusion(3)
    empty.add(torch.zeros(2, 2).long(), torch.full((2, 2), 255))
    assert math.isnan(empty.miou()) and empty.matrix.sum() == 0


def test_labels_out_of_range_and_other_sizes_are_refused():
    with pytest.raises(UsageError, match="label 7 is none of the 4 classes"):
        Confusion(4).add(torch.zeros(1, 2).long(), torch.tensor([[0, 7]]))
    with pytest.raises(UsageError, match="prediction -1"):
        Confusion(4).add(torch.tensor([[-1]]), torch.tensor([[0]]))
    for metric in (Confusion(4), BoundaryF(4)):
        with pytest.raises(ShapeError, match="one size"):
            metric.add(torch.zeros(2, 3).long(), torch.zeros(3, 2).long())
    with pytest.raises(UsageError, match="tolerance"):
        BoundaryF(2, tolerance=0)


@pytest.mark.parametrize("radius", [1, 2])
def test_edge_band_is_a_square_with_two_classes(radius):
    for _, target in PAIRS:
        band = edge_band(target, radius)
        for y in range(target.shape[0]):
            for x in range(target.shape[1]):
                square = target[
                    max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1
                ]
                two = len(set(square.flatten().tolist()) - {255}) > 1
                assert band[y, x] == (two and target[y, x] != 255)


def test_the_border_of_an_ignored_area_is_no_edge():
    labels = torch.zeros(8, 8, dtype=torch.uint8)
    labels[:, 4:] = 255
    assert not edge_band(labels, 3).any()
    assert not contour((labels == 0).numpy(), (labels != 255).numpy()).any()


def literal_f(predicted, target, c: int, radius: int) -> float | None:
    """Contour pixels one by one, matched by their Euclidean distance."""

    def points(labels):
        found = []
        for y in range(target.shape[0]):
            for x in range(target.shape[1]):
                for y2, x2 in ((y, x + 1), (y + 1, x), (y + 1, x + 1)):
                    if y2 >= target.shape[0] or x2 >= target.shape[1]:
                        continue
                    if 255 in (target[y, x], target[y2, x2]):
                        continue
                    if (labels[y, x] == c) != (labels[y2, x2] == c):
                        found.append((y, x))
                        break
        return found

    guess, true = points(predicted), points(target)
    if not guess and not true:
        return None
    if not guess or not true:
        return 0.0

    def share(some, others):
        return sum(
            any((y - v) ** 2 + (x - u) ** 2 <= radius**2 for v, u in others) for y, x in some
        ) / len(some)

    p, r = share(guess, true), share(true, guess)
    return 2 * p * r / (p + r) if p + r else 0.0


@pytest.mark.parametrize("radius", [1, 3])
def test_boundary_f_matches_its_definition(radius):
    metric, found = BoundaryF(CLASSES, tolerance=radius), [[] for _ in range(CLASSES)]
    for predicted, target in PAIRS:
        metric.add(predicted, target)
        for c in range(CLASSES):
            f = literal_f(predicted, target, c, radius)
            if f is not None:
                found[c].append(f)
    means = [np.mean(values) for values in found if values]
    assert metric.mean() == pytest.approx(np.mean(means), abs=1e-12)
    assert metric.pictures.tolist() == [len(values) for values in found]


def test_boundary_f_of_a_shifted_square():
    target = torch.zeros(60, 60, dtype=torch.long)
    target[20:40, 20:40] = 1
    shifted = target.roll(3, 1)
    assert BoundaryF(2, tolerance=3).of(shifted, target).tolist() == [1.0, 1.0]
    assert 0.3 < BoundaryF(2, tolerance=2).of(shifted, target)[1] < 1
    assert BoundaryF(2, tolerance=2).of(torch.zeros_like(target), target).tolist() == [0.0, 0.0]
    assert BoundaryF(2).of(torch.ones_like(target), torch.ones_like(target)).isnan().all()


def test_tolerance_is_pixels_or_a_share_of_the_diagonal():
    assert tolerance_pixels(0.0075, (480, 854)) == 8  # 7.35, rounded up as in DAVIS
    assert tolerance_pixels(3, (480, 854)) == 3


def test_a_perfect_segmentation():
    metric = Segmentation(CLASSES, band=2)
    for _, target in PAIRS:
        metric.add(target.where(target != 255, torch.tensor(0)), target)
    summary = metric.summary()
    assert [summary[k] for k in ("miou", "band_miou", "boundary_f", "pixel_accuracy")] == [1.0] * 4
    assert len(summary["iou"]) == CLASSES


def test_the_band_is_worse_where_edges_are_wrong():
    target = torch.zeros(40, 40, dtype=torch.long)
    target[:, 20:] = 1
    metric = Segmentation(2, band=3)
    metric.add(target.roll(2, 1).where(torch.arange(40) > 2, torch.tensor(0)), target)
    assert metric.near.miou() < metric.whole.miou() < 1
