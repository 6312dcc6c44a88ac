"""Scores of whole cells by distance: against a literal evaluation, and without seams."""

from __future__ import annotations

import pytest
import torch

from fmupsample.upsamplers import (
    BilateralCells,
    BilateralCellsConfig,
    ReSFU,
    ReSFUConfig,
    Upsampler,
)
from fmupsample.upsamplers.bilateral.distance import CellDistance
from fmupsample.upsamplers.cells import cell_products


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def cells_around(n: int, pixels: int, p: int, reach: int) -> list[int]:
    own = (2 * p + 1) * n // (2 * pixels)  # the cell that the pixel's centre lies in
    return [min(max(own + d, 0), n - 1) for d in range(-reach, reach + 1)]


@pytest.mark.parametrize(
    ("cells", "size", "kernel_size", "window"),
    [
        ((4, 5), (12, 20), 3, None),
        ((3, 4), (3, 4), 3, None),
        ((3, 4), (10, 13), 5, None),
        ((1, 2), (7, 9), 3, None),
        ((4, 5), (12, 20), 3, (slice(2, 9), slice(5, 16))),
    ],
)
def test_products_are_those_of_the_definition(cells, size, kernel_size, window):
    query, key, offset = normal(2, 6, *size), normal(2, 6, *cells, seed=2), normal(2, 1, *cells)
    whole = torch.zeros(2, kernel_size**2, *size, dtype=torch.float64)
    for y in range(size[0]):
        rows = cells_around(cells[0], size[0], y, kernel_size // 2)
        for x in range(size[1]):
            columns = cells_around(cells[1], size[1], x, kernel_size // 2)
            places = [(i, j) for i in rows for j in columns]
            for d, (i, j) in enumerate(places):
                product = (query[:, :, y, x] * key[:, :, i, j]).sum(1)
                whole[:, d, y, x] = product + offset[:, 0, i, j]
    if window is None:
        found = cell_products(query, key, offset, kernel_size, size)
    else:
        whole, query = whole[(..., *window)], query[(..., *window)]
        found = cell_products(query, key, offset, kernel_size, size, window)
    torch.testing.assert_close(found, whole)


@pytest.mark.parametrize("shared", [False, True])
def test_scores_are_distances(shared):
    module = CellDistance(8, 2, 3, shared=shared).double()
    query, key = normal(1, 8, 6, 8), normal(1, 8, 3, 4, seed=2)
    assert not module(query, key, (6, 8)).any()  # before training it says nothing
    with torch.no_grad():
        module.weight.uniform_(0.1, 0.5)
    scores = module(query, key, (6, 8))
    q = torch.nn.functional.group_norm(query, 2)
    k = torch.nn.functional.group_norm(key, 2)
    weight = module.weight.expand(8)
    expected = [
        -8 * (weight * (q[0, :, 3, 4] - k[0, :, i, j]).square()).mean()
        for i in (0, 1, 2) for j in (1, 2, 3)
    ]  # fmt: skip
    difference = scores[0, :, 3, 4] - torch.stack(expected)
    torch.testing.assert_close(difference, difference[:1].expand(9))  # the same for all neighbours


def test_gradients():
    module = CellDistance(4, 2, 3, shared=False).double()
    with torch.no_grad():
        module.weight.uniform_(0.1, 0.5)
    for size in ((4, 6), (5, 7)):
        query = normal(1, 4, *size).requires_grad_()
        key = normal(1, 4, 2, 3, seed=2).requires_grad_()

        def scores(q, k, w, size=size):
            return torch.func.functional_call(module, {"weight": w}, (q, k, size))

        assert torch.autograd.gradcheck(scores, (query, key, module.weight))


def head(kind: type[Upsampler], **changes) -> Upsampler:
    torch.manual_seed(0)
    more = {"middle": 16, "groups": 2, "neighbours": "coarse"} if kind is ReSFU else {"channels": 6}
    config = {"embedding": 8, "norm_groups": 2, **more, **changes}
    made = ReSFUConfig(6, **config) if kind is ReSFU else BilateralCellsConfig(**config)
    up = kind(made).double().eval().requires_grad_(False)
    for name, parameter in up.named_parameters():
        if name.endswith(("_scores.weight", "score.weight")):
            torch.nn.init.uniform_(parameter, 0.2, 0.8)
    return up


def step_at_borders(up: Upsampler, ratio: int) -> float:
    """The largest difference of two pixels beside each other but in different cells."""
    x = normal(1, 6, 5, 6)
    down, across = torch.linspace(0, 3, 5 * ratio), torch.linspace(0, 2, 6 * ratio)
    rows, columns = torch.meshgrid(down.double(), across.double(), indexing="ij")
    image = torch.stack([rows.sin(), columns.cos(), (rows + columns).sin()])[None]
    step = up(x, image).diff(dim=3).abs().amax((0, 1, 2))
    return float(step[ratio - 1 :: ratio].max())


def test_there_are_no_seams():
    """Four times as many pixels: a quarter of the step where it is continuous, else all of it."""

    def share_that_stays(up: Upsampler) -> float:
        return step_at_borders(up, 96) / step_at_borders(up, 24)

    assert share_that_stays(head(BilateralCells, sigma_range=None)) < 0.35
    # Without the taper cells come and go; scores of offsets are others beyond a border.
    plain = head(BilateralCells, taper=False, sigma_space=0.75, sigma_range=None)
    for scores in (plain.semantic_scores, plain.detail_scores):
        scores.weight.zero_()
    assert share_that_stays(plain) > 0.7
    assert share_that_stays(head(ReSFU)) > 0.7
