"""SAPA against its formulas, its border modes, and its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reference.neighbours import gathered, nearest

from fmupsample.errors import ShapeError, UsageError
from fmupsample.upsamplers import SAPA, SAPAConfig, load_official
from fmupsample.upsamplers.sapa import NORMALISATIONS, SIMILARITIES


def sapa(**options) -> SAPA:
    torch.manual_seed(0)
    options = {"channels": 6, "guidance_channels": 6, "stem": False, "embedding": 4} | options
    up = SAPA(SAPAConfig(**options)).double()
    for parameter in up.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return up


def inputs(cells=(4, 5), size=(11, 20), batch=2, guidance=6):
    torch.manual_seed(1)
    shape = (batch, 6, *cells)
    return torch.randn(shape).double(), torch.randn(batch, guidance, *size).double()


def literal(up: SAPA, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Result and weights ``[B, K*K, H, W]`` from the formulas, neighbour by neighbour."""
    c, size = up.config, tuple(y.shape[2:])

    def norm(t, layer):
        if not c.norm:
            return t
        weight = layer.weight
        t = t.movedim(1, 3)
        mean, var = t.mean(3, keepdim=True), t.var(3, correction=0, keepdim=True)
        t = (t - mean) / (var + 1e-5).sqrt()
        return (t if weight is None else t * weight + layer.bias).movedim(3, 1)

    def linear(t, layer):
        return torch.einsum("oc,bchw->bohw", layer.weight[..., 0, 0], t) + layer.bias[:, None, None]

    xn, yn = norm(x, up.feature_norm), norm(y, up.guidance_norm)
    query, key = yn, xn
    if c.similarity != "inner":
        query, key = linear(yn, up.query), linear(xn, up.key)
    if c.similarity in ("gated", "addition"):
        own = linear(nearest(x, size), up.own_query)
        gate = 0.5
        if c.similarity == "gated":
            gate = nearest(torch.sigmoid(linear(xn, up.gate)), size)
        query = gate * query + (1 - gate) * own
        query = 2 * query if c.similarity == "addition" else query
    keys, there = gathered(key, size, c.kernel_size)
    scores = (keys * query[:, :, None]).sum(1)
    shape = {
        "exp": lambda s: (s - s.amax(1, keepdim=True)).exp(),
        "relu": lambda s: F.relu(s) + 1e-6,
        "sigmoid": lambda s: torch.sigmoid(s) + 1e-6,
        "softplus": lambda s: F.softplus(s) + 1e-6,
        "none": lambda s: s,
    }
    weights = shape[c.normalisation](scores)
    if c.border == "masked":
        weights = weights * there
    if c.normalisation != "none":
        weights = weights / weights.sum(1, keepdim=True)
    weights = weights * there
    values, _ = gathered(x, size, c.kernel_size)
    return (values * weights[:, None]).sum(2), weights


@pytest.mark.parametrize("border", ["masked", "zeros"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_the_similarities_are_their_formulas(similarity, border):
    up = sapa(similarity=similarity, border=border)
    x, y = inputs()
    expected, weights = literal(up, x, y)
    torch.testing.assert_close(up.kernels(x, y), weights, atol=1e-12, rtol=0)
    torch.testing.assert_close(up(x, y), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("border", ["masked", "zeros"])
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_the_normalisations_are_their_formulas(normalisation, border):
    up = sapa(normalisation=normalisation, border=border, kernel_size=3)
    x, y = inputs(size=(8, 15))
    expected, weights = literal(up, x, y)
    torch.testing.assert_close(up.kernels(x, y), weights, atol=1e-12, rtol=0)
    torch.testing.assert_close(up(x, y), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize(
    ("cells", "size"), [((3, 4), (42, 56)), ((1, 1), (5, 3)), ((2, 3), (2, 3)), ((5, 3), (11, 20))]
)
def test_any_ratio_and_kernel_size(kernel_size, cells, size):
    up = sapa(kernel_size=kernel_size, norm=False)
    x, y = inputs(cells, size, batch=1)
    torch.testing.assert_close(up(x, y), literal(up, x, y)[0], atol=1e-12, rtol=0)
    # Convex: weights are shares of the cells that exist.
    weights = up.kernels(x, y)
    torch.testing.assert_close(weights.sum(1), torch.ones(1, *size).double())
    assert weights.min() >= 0
    constant = torch.full_like(x, 2.5)
    torch.testing.assert_close(
        up.reassemble(weights, constant), torch.full((1, 6, *size), 2.5).double()
    )


def test_the_official_border_fades_and_says_so():
    masked, zeros = sapa(), sapa(border="zeros")
    assert masked.linear_in_value and not zeros.linear_in_value
    assert not sapa(normalisation="none").linear_in_value
    x, y = inputs(cells=(4, 4), size=(32, 32))
    sums = zeros.kernels(x, y).sum(1)
    assert sums[:, 16, 16].min() < 1 and sums[:, 0, 0].max() < 0.9


def test_gradients():
    up = sapa(kernel_size=3, embedding=2)
    x, y = inputs((2, 3), (5, 7), batch=1)
    names, parameters = zip(*up.named_parameters(), strict=True)

    def run(x, y, *values):
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(up, state, (x, y))

    given = [t.detach().requires_grad_() for t in (x, y, *parameters)]
    assert torch.autograd.gradcheck(run, given)


def test_it_follows_an_edge_it_was_given():
    """Features and guidance that agree: the border between them is where the guidance has it."""
    up = SAPA(SAPAConfig(channels=2, stem=False, similarity="inner", norm=False))
    x = torch.zeros(1, 2, 6, 6)
    x[:, 0, :, :3], x[:, 1, :, 3:] = 9, 9
    x[:, :, :, 2] = 4.5  # the cell that the edge goes through
    y = torch.zeros(1, 2, 48, 48)
    y[:, 0, :, :20], y[:, 1, :, 20:] = 3, 3
    out = up(x, y)[0, :, 24]
    assert out[0, 19] > 8.9 and out[0, 20] < 0.1 and out[1, 20] > 8.9


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="as many guidance channels"):
        SAPAConfig(channels=6, guidance_channels=4, similarity="inner")
    for wrong in ({"kernel_size": 4}, {"similarity": "cosine"}, {"border": "reflect"}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            SAPAConfig(channels=6, **wrong)
    x, y = inputs()
    with pytest.raises(ShapeError, match="swapped"):
        sapa()(y, x)
    with pytest.raises(ShapeError, match="guidance map with 6 channels, got 3"):
        sapa()(x, y[:, :3])
    with pytest.raises(ShapeError, match="built for 6 channels, got 4"):
        sapa()(x[:, :4], y)


@pytest.mark.parametrize("kind", ["sapa-b", "sapa-g"])
def test_official_parameters(kind):
    similarity = {"sapa-b": "bilinear", "sapa-g": "gated"}[kind]
    up = sapa(similarity=similarity, border="zeros")
    theirs = {"guidance_norm": "norm_y", "feature_norm": "norm_x", "key": "k", "own_query": "qx"}
    theirs["query"] = "q" if kind == "sapa-b" else "qy"
    state = {}
    for name, tensor in up.state_dict().items():
        first, _, rest = name.partition(".")
        state[f"{theirs.get(first, first)}.{rest}"] = (
            tensor.flatten(1) if tensor.ndim > 1 else tensor
        )
    x, y = inputs()
    again = load_official(kind, state, ratio=2, kernel_size=5, embedding_dim=4)
    torch.testing.assert_close(again(x, y), literal(up, x, y)[0], atol=1e-12, rtol=0)
    with pytest.raises(UsageError, match="no option heads"):
        load_official(kind, state, heads=2)
