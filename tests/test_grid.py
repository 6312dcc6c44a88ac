"""Coordinates: exact at every ratio."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.reassembly import axis

from fmupsample.ops.grid import (
    interpolation_matrix,
    interpolation_part,
    neighbour_inside,
    plan_axis,
)

sizes = st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(n, 8 * n + 3)))


@given(sizes, st.booleans())
def test_base_and_fraction_are_those_of_rational_arithmetic(size, fractional):
    plan = plan_axis(*size, fractional)
    bases, fractions = axis(*size, fractional)
    assert plan.base.tolist() == bases
    assert plan.fraction.tolist() == fractions


@given(sizes, st.booleans())
def test_groups_tile_the_axis(size, fractional):
    plan = plan_axis(*size, fractional)
    assert plan.starts[0] == 0
    assert plan.starts[-1] == size[1]
    for g in range(plan.groups):
        members = plan.base[plan.starts[g] : plan.starts[g + 1]]
        assert 0 < len(members) <= plan.slots
        assert (members == plan.first + g).all()
    slots = plan.slots_of_pixels(0, plan.groups)
    assert len(slots.unique()) == size[1]  # no two pixels share a slot
    assert int(slots.max()) < plan.groups * plan.slots
    runs = plan.runs(0, plan.groups)
    assert sum((g1 - g0) * length for g0, g1, length in runs) == size[1]


def test_a_float32_floor_would_be_wrong():
    # The reason for integer arithmetic: sizes at which float32 puts a pixel into another cell.
    cells, pixels = 7, 23
    p = torch.arange(pixels, dtype=torch.float32)
    ratio = torch.tensor(cells / pixels, dtype=torch.float32)
    in_float32 = ((p + 0.5) * ratio - 0.5).floor().long()
    assert not torch.equal(in_float32, plan_axis(cells, pixels, True).base)


@given(sizes, st.integers(0, 2))
def test_interpolation_matrix_rows_sum_to_one_and_match_interpolate(size, padding):
    cells, pixels = size
    matrix = interpolation_matrix(cells, pixels, padding)
    assert matrix.shape == (pixels, cells + 2 * padding)
    torch.testing.assert_close(matrix.sum(1), torch.ones(pixels, dtype=torch.float64))
    x = torch.randn(cells, dtype=torch.float64)
    padded = torch.cat([x[:1].expand(padding), x, x[-1:].expand(padding)])
    expected = torch.nn.functional.interpolate(x[None, None], size=pixels, mode="linear")[0, 0]
    torch.testing.assert_close(matrix @ padded, expected, atol=1e-12, rtol=0)


@given(sizes, st.integers(0, 2), st.data())
def test_a_part_of_the_interpolation_matrix_leaves_out_zeros(size, padding, data):
    cells, pixels = size
    first = data.draw(st.integers(0, pixels - 1))
    step = data.draw(st.integers(1, 3))
    wanted = torch.arange(first, data.draw(st.integers(first + 1, pixels)), step)
    read, part = interpolation_part(cells, pixels, wanted, padding)
    whole = interpolation_matrix(cells, pixels, padding)[wanted]
    assert torch.equal(part, whole[:, read])
    assert (whole.sum(1) - part.sum(1)).abs().max() < 1e-12
    assert part.shape[1] <= (wanted[-1] - wanted[0]) * cells / pixels + 3


@pytest.mark.parametrize("offset", [-2, -1, 0, 1, 2])
def test_neighbour_inside_counts_output_pixels_at_integer_ratios(offset):
    p = torch.arange(5 * 7) + offset * 7
    assert torch.equal(neighbour_inside(5, 35, offset), (p >= 0) & (p < 35))


@given(sizes)
def test_the_pixel_itself_is_always_inside(size):
    assert neighbour_inside(*size, 0).all()
