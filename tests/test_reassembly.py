"""The reassembly operator against its definition, in value, gradient and contract."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.reassembly import reassemble as literal

from fmupsample.errors import ShapeError
from fmupsample.ops import reassemble

# (h, w, H, W, K): integer ratios (even, odd, unequal), non-integer ones, 1:1, single cells, rows.
SHAPES = [
    (3, 4, 42, 56, 3),
    (3, 4, 21, 12, 3),
    (5, 6, 7, 9, 3),
    (4, 5, 4, 5, 5),
    (1, 1, 14, 9, 3),
    (1, 1, 1, 1, 1),
    (1, 6, 5, 31, 3),
    (30, 40, 45, 51, 3),
]


def draw(h, w, height, width, k, *, batch=2, channels=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(h * 1000 + width)
    value = torch.randn(batch, channels, h, w, generator=generator, dtype=torch.float64)
    weights = torch.randn(batch, k * k, height, width, generator=generator, dtype=torch.float64)
    return value.to(dtype), weights.to(dtype)


@pytest.mark.parametrize("fractional", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_match_the_definition(shape, fractional):
    value, weights = (t.requires_grad_() for t in draw(*shape))
    out, expected = (
        reassemble(value, weights, fractional=fractional),
        literal(value, weights, fractional),
    )
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    direction = torch.randn_like(out)
    got = torch.autograd.grad(out, (value, weights), direction)
    want = torch.autograd.grad(expected, (value, weights), direction)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


@settings(max_examples=40)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.tuples(st.floats(1, 6), st.floats(1, 6)),
    st.sampled_from([1, 3, 5]),
    st.booleans(),
)
def test_any_size_and_ratio(cells, ratio, k, fractional):
    height, width = (max(n, round(n * r)) for n, r in zip(cells, ratio, strict=True))
    value, weights = draw(*cells, height, width, k, batch=1, channels=2)
    out = reassemble(value, weights, fractional=fractional)
    torch.testing.assert_close(out, literal(value, weights, fractional), atol=1e-12, rtol=0)


@pytest.mark.parametrize("fractional", [True, False])
def test_gradcheck(fractional):
    value, weights = (t.requires_grad_() for t in draw(2, 3, 5, 6, 3, batch=1, channels=2))

    def f(v, w):
        return reassemble(v, w, fractional=fractional)

    assert torch.autograd.gradcheck(f, (value, weights))
    assert torch.autograd.gradgradcheck(f, (value, weights))


@pytest.mark.parametrize("fractional", [True, False])
def test_opcheck(fractional):
    value, weights = (t.requires_grad_() for t in draw(2, 3, 5, 6, 3, dtype=torch.float32))
    ops = torch.ops.fmupsample
    torch.library.opcheck(ops.reassemble.default, (value, weights, fractional))
    grad = torch.randn(2, 5, 5, 6, requires_grad=True)
    torch.library.opcheck(ops.reassemble_grad_value.default, (grad, weights, 2, 3, fractional))
    torch.library.opcheck(ops.reassemble_grad_weights.default, (grad, value, 3, fractional))


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_rounds_only_a_few_times(dtype, unit):
    value, weights = draw(4, 5, 56, 70, 3)
    weights = weights.softmax(1)
    out = reassemble(value.to(dtype), weights.float())
    assert out.dtype == dtype
    exact = literal(value.to(dtype).double(), weights.float().double(), True)
    assert (out.double() - exact).abs().max() <= 2 * unit * value.abs().max()


def test_tiles_do_not_show(monkeypatch):
    from fmupsample.ops import tiled

    value, weights = draw(6, 7, 60, 63, 3)
    whole = reassemble(value, weights)
    monkeypatch.setitem(tiled._TILE_BYTES, "cpu", 1)  # one row of groups at a time
    rows = reassemble(value, weights)
    monkeypatch.setitem(tiled._TILE_BYTES, "cpu", 1 << 40)
    torch.testing.assert_close(rows, whole, atol=1e-13, rtol=0)
    torch.testing.assert_close(reassemble(value, weights), whole, atol=1e-13, rtol=0)


def test_only_the_wanted_gradients_are_computed():
    value, weights = draw(3, 4, 12, 16, 3)
    out = reassemble(value, weights.requires_grad_())
    assert all(t is None or t.shape != weights.shape for t in out.grad_fn.saved_tensors)
    out.sum().backward()
    assert weights.grad is not None
    assert value.grad is None


def test_strides_do_not_matter():
    value, weights = draw(4, 6, 20, 24, 3)
    expected = reassemble(value, weights)
    last = value.to(memory_format=torch.channels_last)
    sliced = torch.stack([value, value], -1)[..., 1]
    for other in (last, sliced):
        torch.testing.assert_close(reassemble(other, weights), expected, atol=0, rtol=0)
    spread = weights.to(memory_format=torch.channels_last)
    torch.testing.assert_close(reassemble(value, spread), expected, atol=0, rtol=0)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty_batch_and_empty_channels(shape):
    batch, channels = shape
    value = torch.randn(batch, channels, 2, 3, requires_grad=True)
    weights = torch.rand(batch, 9, 4, 6, requires_grad=True)
    out = reassemble(value, weights)
    assert out.shape == (batch, channels, 4, 6)
    out.sum().backward()
    assert value.grad.shape == value.shape


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.booleans())
def test_convex_weights_stay_in_the_hull(seed, fractional):
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(1, 3, 3, 4, generator=generator, dtype=torch.float64)
    weights = torch.randn(1, 9, 17, 20, generator=generator, dtype=torch.float64).softmax(1)
    out = reassemble(value, weights, fractional=fractional)
    low, high = value.amin((2, 3), keepdim=True), value.amax((2, 3), keepdim=True)
    assert (out >= low - 1e-12).all()
    assert (out <= high + 1e-12).all()


def test_affine_maps_commute():
    value, weights = draw(4, 5, 23, 37, 3)
    weights = weights.softmax(1)
    matrix, offset = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, dtype=torch.float64)

    def mapped(t):
        return torch.einsum("ov,bvhw->bohw", matrix, t) + offset[:, None, None]

    before, after = reassemble(mapped(value), weights), mapped(reassemble(value, weights))
    torch.testing.assert_close(before, after, atol=1e-12, rtol=0)


def test_compiles():
    value, weights = draw(2, 3, 4, 6, 3)

    def f(v, w):
        return reassemble(v * 2, w)

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(value, weights), f(value, weights))


@pytest.mark.parametrize(
    ("value", "weights", "words"),
    [
        ((1, 2, 3, 4), (1, 8, 6, 8), "odd square"),
        ((1, 2, 3, 4), (1, 16, 6, 8), "odd square"),
        ((2, 2, 3, 4), (1, 9, 6, 8), "one batch"),
        ((1, 2, 6, 8), (1, 9, 3, 4), "smaller"),
        ((2, 3, 4), (1, 9, 3, 4), "one batch"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(value, weights, words):
    with pytest.raises(ShapeError, match=words):
        reassemble(torch.zeros(value), torch.zeros(weights))
