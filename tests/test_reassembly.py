"""The reassembly operator against its definition, in value, gradient and contract."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.reassembly import reassemble as literal

from fmupsample.errors import ShapeError
from fmupsample.ops import plain, reassemble, reassemble_window, similarity, similarity_window
from fmupsample.ops.plain import banded, grouped

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


@pytest.fixture(params=["grouped", "banded"])
def way(request, monkeypatch):
    """Both ways to cut the products, whatever the number of channels."""
    monkeypatch.setattr(plain, "_MANY_CHANNELS", 0 if request.param == "banded" else 10**9)
    return request.param


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("fractional", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_match_the_definition(shape, fractional, channels_last):
    value, weights = (t.requires_grad_() for t in draw(*shape))
    if channels_last:
        value = value.detach().to(memory_format=torch.channels_last).requires_grad_()
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


@settings(max_examples=60)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.tuples(st.floats(1, 17), st.floats(1, 17)),
    st.sampled_from([1, 3, 5, 7]),
    st.booleans(),
    st.booleans(),
)
def test_any_size_and_ratio(cells, ratio, k, fractional, channels_last):
    height, width = (max(n, round(n * r)) for n, r in zip(cells, ratio, strict=True))
    value, weights = draw(*cells, height, width, k, batch=1, channels=2)
    expected = literal(value, weights, fractional)
    if channels_last:
        value = value.to(memory_format=torch.channels_last)
    for way in (grouped, banded):
        out = way.reassemble(value, weights, fractional)
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    # Gradients: the two ways are each other's check, and the definition checks both above.
    grad = torch.randn_like(out)
    grads = [way.grad_value(grad, weights, *cells, fractional) for way in (grouped, banded)]
    torch.testing.assert_close(*grads, atol=1e-11, rtol=0)
    grads = [way.grad_weights(grad, value, k, fractional) for way in (grouped, banded)]
    torch.testing.assert_close(*grads, atol=1e-11, rtol=0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("fractional", [True, False])
def test_gradcheck(fractional):
    value, weights = (t.requires_grad_() for t in draw(2, 3, 5, 6, 3, batch=1, channels=2))

    def f(v, w):
        return reassemble(v, w, fractional=fractional)

    assert torch.autograd.gradcheck(f, (value, weights))
    assert torch.autograd.gradgradcheck(f, (value, weights))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("fractional", [True, False])
def test_opcheck(fractional, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    value, weights = draw(2, 3, 5, 6, 3, dtype=torch.float32)
    value, weights = value.to(memory_format=layout).requires_grad_(), weights.requires_grad_()
    ops = torch.ops.fmupsample
    torch.library.opcheck(ops.reassemble.default, (value, weights, fractional))
    grad = torch.randn(2, 5, 5, 6).to(memory_format=layout).requires_grad_()
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


@pytest.mark.parametrize("cut", [grouped, banded])
@pytest.mark.parametrize("channels_last", [False, True])
def test_tiles_do_not_show(monkeypatch, cut, channels_last):
    value, weights = draw(6, 9, 60, 145, 3)
    if channels_last:
        value = value.to(memory_format=torch.channels_last)
    grad = torch.randn(2, 5, 60, 145, dtype=torch.float64)

    def everything(budget):
        if cut is grouped:
            monkeypatch.setitem(grouped._TILE_BYTES, "cpu", budget)
        else:
            monkeypatch.setattr(banded, "_TILE_BYTES", budget)
        return (
            cut.reassemble(value, weights, True),
            cut.grad_value(grad, weights, 6, 9, True),
            cut.grad_weights(grad, value, 3, True),
        )

    # One row of groups, or one block, at a time; or all at once.
    for few, all_at_once in zip(everything(1), everything(1 << 40), strict=True):
        torch.testing.assert_close(few, all_at_once, atol=1e-12, rtol=0)


@pytest.mark.parametrize("channels", [3, 200])
def test_channels_last_in_channels_last_out(channels):
    value, weights = draw(3, 4, 42, 56, 3, channels=channels, dtype=torch.float32)
    last = value.to(memory_format=torch.channels_last)
    out = reassemble(last, weights)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, reassemble(value, weights), atol=1e-5, rtol=0)
    assert reassemble(value, weights).is_contiguous()
    # A map that is both is contiguous first, as everywhere in PyTorch.
    assert reassemble(last[:, :1].contiguous(), weights).is_contiguous()
    last.requires_grad_()
    reassemble(last, weights).square().sum().backward()
    assert last.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [3, 200])
def test_what_is_not_a_number_stays_where_it_is_read(channels):
    value, weights = draw(6, 7, 60, 70, 3, batch=1, channels=channels)
    value[0, 1, 2, 3] = float("nan")
    value[0, 2, 4, 4] = float("inf")
    spoilt = ~torch.isfinite(reassemble(value, weights)[0])
    assert spoilt[1, 25, 35]
    assert spoilt.flatten(1).sum(1)[[0, 1, 2]].gt(0).tolist() == [False, True, True]
    assert not spoilt[1, :, :15].any() and not spoilt[1, 45:].any() and not spoilt[2, :20].any()


def test_only_the_wanted_gradients_are_computed():
    value, weights = draw(3, 4, 12, 16, 3)
    out = reassemble(value, weights.requires_grad_())
    assert all(t is None or t.shape != weights.shape for t in out.grad_fn.saved_tensors)
    out.sum().backward()
    assert weights.grad is not None
    assert value.grad is None


@pytest.mark.usefixtures("way")
def test_strides_do_not_matter():
    value, weights = draw(4, 6, 20, 24, 3)
    expected = reassemble(value, weights)
    last = value.to(memory_format=torch.channels_last)
    sliced = torch.stack([value, value], -1)[..., 1]
    for other in (last, sliced):
        torch.testing.assert_close(reassemble(other, weights), expected, atol=1e-14, rtol=0)
    spread = weights.to(memory_format=torch.channels_last)
    torch.testing.assert_close(reassemble(value, spread), expected, atol=1e-14, rtol=0)


@pytest.mark.usefixtures("way")
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


class Decoder(torch.nn.Module):
    """A model with the operator in its middle."""

    def __init__(self, channels_last=False):
        super().__init__()
        self.project = torch.nn.Conv2d(5, 4, 1)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format

    def forward(self, value, scores):
        value = self.project(value).contiguous(memory_format=self.layout)
        return reassemble(value, scores.softmax(1)).square().mean((2, 3))


@pytest.mark.parametrize("channels_last", [False, True])
def test_compiles_with_its_gradients(channels_last):
    model = Decoder(channels_last)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for function in (model, compiled):
        value, scores = draw(2, 3, 9, 14, 3, dtype=torch.float32)
        value.requires_grad_()
        scores.requires_grad_()
        model.zero_grad()
        out = function(value, scores)
        out.sum().backward()
        results.append((out, value.grad, scores.grad, model.project.weight.grad.clone()))
    for slow, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow)


def test_export():
    model, arguments = Decoder().eval(), draw(2, 3, 9, 14, 3, dtype=torch.float32)
    program = torch.export.export(model, arguments)
    assert "fmupsample.reassemble" in str(program.graph)
    torch.testing.assert_close(program.module()(*arguments), model(*arguments))


def test_export_with_a_batch_of_any_size():
    model, arguments = Decoder().eval(), draw(2, 3, 9, 14, 3, dtype=torch.float32)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(model, arguments, dynamic_shapes=(batch, batch))
    larger = draw(2, 3, 9, 14, 3, batch=5, dtype=torch.float32)
    torch.testing.assert_close(program.module()(*larger), model(*larger))


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


@pytest.mark.parametrize("fractional", [False, True])
@pytest.mark.parametrize("size", [(12, 15), (11, 16)])
def test_windows_of_both_operators_are_cut_from_the_whole(fractional, size):
    generator = torch.Generator().manual_seed(0)
    low, query, weights = (
        torch.randn(2, n, *shape, generator=generator).double()
        for n, shape in ((3, (4, 5)), (3, size), (9, size))
    )
    box = (..., slice(3, 10), slice(2, 13))
    whole = reassemble(low, weights, fractional=fractional)
    part = reassemble_window(low, weights[box], size, (3, 2), fractional=fractional)
    torch.testing.assert_close(part, whole[box])
    whole = similarity(query, low, 3, fractional=fractional)
    part = similarity_window(query[box], low, 3, size, (3, 2), fractional=fractional)
    torch.testing.assert_close(part, whole[box])
    for corner in ((9, 0), (0, -1)):
        with pytest.raises(ShapeError, match="is no part of a map"):
            similarity_window(query[box], low, 3, size, corner, fractional=fractional)
    with pytest.raises(ShapeError, match="one batch and width"):
        similarity_window(query[box], low[:, :2], 3, size, fractional=fractional)
