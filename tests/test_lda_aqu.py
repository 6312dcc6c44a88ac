"""LDA-AQU against its formulas, in both modes, and its gradients."""

from __future__ import annotations

from math import floor

import pytest
import torch
import torch.nn.functional as F

from fmupsample.errors import ShapeError, UsageError
from fmupsample.upsamplers import LDAAQU, LDAAQUConfig, load_official


def lda(**options) -> LDAAQU:
    torch.manual_seed(0)
    up = LDAAQU(LDAAQUConfig(**({"channels": 8, "reduction": 2, "reach": 1.3} | options))).double()
    for parameter in up.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return up


def features(cells=(4, 5), batch=2):
    return torch.randn(batch, 8, *cells, generator=torch.Generator().manual_seed(1)).double()


def bilinear(x, row, column, clamp):
    """One bilinear sample of ``[C, h, w]``: the border's beyond it, or zeros."""
    h, w = x.shape[1:]
    if clamp:
        row, column = min(max(row, 0), h - 1), min(max(column, 0), w - 1)
    total = torch.zeros(x.shape[0], dtype=x.dtype)
    for r in (floor(row), floor(row) + 1):
        for c in (floor(column), floor(column) + 1):
            if 0 <= r < h and 0 <= c < w:
                total = total + x[:, r, c] * (1 - abs(row - r)) * (1 - abs(column - c))
    return total


def literal(up: LDAAQU, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Pixel by pixel, neighbour by neighbour, group by group."""
    c, official = up.config, up.config.mode == "official"
    normal = F.layer_norm(x.movedim(1, 3), (8,), up.norm.weight, up.norm.bias).movedim(3, 1)
    query, key = F.conv2d(normal, up.query.weight), F.conv2d(normal, up.key.weight)
    query = F.interpolate(query, size, mode="bilinear", align_corners=official)
    own, neighbours = c.hidden // c.groups, c.kernel_size**2
    hidden = F.conv2d(
        query.reshape(-1, own, *size), up.offset_depthwise.weight, padding=1, groups=own
    ).movedim(1, 3)
    hidden = F.layer_norm(hidden, (own,), up.offset_norm.weight, up.offset_norm.bias)
    offset = F.conv2d(F.gelu(hidden).movedim(3, 1), up.offset.weight, up.offset.bias, padding=1)
    offset = c.reach * offset.tanh().reshape(len(x), c.groups, neighbours, 2, *size)
    out = torch.zeros(len(x), 8, *size).double()
    (h, w), (height, width) = x.shape[2:], size
    for b in range(len(x)):
        for p in range(height):
            for q in range(width):
                near, values, beyond = [], [], []
                for n in range(neighbours):
                    keys, found = [], []
                    for g in range(c.groups):
                        dy, dx = offset[b, g, n, :, p, q].tolist()
                        dy += c.spacing * (n // c.kernel_size - c.kernel_size // 2)
                        dx += c.spacing * (n % c.kernel_size - c.kernel_size // 2)
                        if official:
                            row = (p + dy) * (h - 1) / (height - 1)
                            column = (q + dx) * (w - 1) / (width - 1)
                        else:
                            row = (p + 0.5) * h / height - 0.5 + dy
                            column = (q + 0.5) * w / width - 0.5 + dx
                        keys.append(
                            bilinear(key[b].view(c.groups, own, h, w)[g], row, column, not official)
                        )
                        values_of = x[b].view(c.groups, 8 // c.groups, h, w)[g]
                        found.append(bilinear(values_of, row, column, not official))
                        beyond.append(not (-0.5 <= row <= h - 0.5 and -0.5 <= column <= w - 0.5))
                    near.append(torch.cat(keys))
                    values.append(torch.cat(found))
                near, values = torch.stack(near), torch.stack(values)  # [n, hidden], [n, C]
                beyond = torch.tensor(beyond).view(neighbours, c.groups)
                for head in range(c.heads):
                    part = slice(head * c.hidden // c.heads, (head + 1) * c.hidden // c.heads)
                    keys = near[:, part] + (0 if up.key_bias is None else up.key_bias[head])
                    scores = keys @ query[b, part, p, q] * (c.hidden // c.heads) ** -0.5
                    if not official:
                        mask = beyond[:, head] if c.heads == c.groups else beyond.all(1)
                        scores = scores.masked_fill(mask, torch.finfo(scores.dtype).min)
                    own_values = values[:, head * 8 // c.heads : (head + 1) * 8 // c.heads]
                    out[b, head * 8 // c.heads : (head + 1) * 8 // c.heads, p, q] = (
                        scores.softmax(0) @ own_values
                    )
    return out


@pytest.mark.parametrize("mode", ["fixed", "official"])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (1, 2), (2, 2)])
def test_it_is_its_formula(mode, heads, groups):
    up = lda(mode=mode, heads=heads, groups=groups)
    x = features((3, 4), batch=1)
    with torch.no_grad():
        torch.testing.assert_close(up(x, size=(7, 9)), literal(up, x, (7, 9)), atol=1e-12, rtol=0)
    # The way that autograd sees, neighbours recomputed, is the same.
    torch.testing.assert_close(up(x, size=(7, 9)), literal(up, x, (7, 9)), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("cells", "size"),
    [((3, 4), (42, 56)), ((1, 1), (6, 5)), ((1, 4), (1, 9)), ((2, 2), (2, 2)), ((5, 3), (11, 20))],
)
def test_results_stay_in_the_range_of_the_features(cells, size):
    up = lda(reach=9.0)  # far beyond the border: even then nothing is made up
    x = features(cells)
    out = up(x, size=size)
    assert torch.isfinite(out).all()
    for of_out, of_x in zip(out.flatten(2).unbind(1), x.flatten(2).unbind(1), strict=True):
        assert (of_out.amax(1) <= of_x.amax(1) + 1e-9).all()
        assert (of_out.amin(1) >= of_x.amin(1) - 1e-9).all()
    weights = up.kernels(x, size=size)
    torch.testing.assert_close(weights[:, :9].sum(1), torch.ones(2, *size).double())
    constant = torch.full_like(x, 2.5)
    torch.testing.assert_close(up(constant, size=size), torch.full_like(out, 2.5))


def test_linear_in_value_with_one_group():
    up = lda()
    x, other = features(), torch.randn(2, 3, 4, 5).double()
    weights = up.kernels(x, size=(13, 12))
    assert up.linear_in_value and not lda(groups=2).linear_in_value
    torch.testing.assert_close(up.reassemble(weights, x), up(x, size=(13, 12)))
    mixed = up.reassemble(weights, 2 * other + 1)
    torch.testing.assert_close(mixed, 2 * up.reassemble(weights, other) + 1)
    two = lda(groups=2)
    with pytest.raises(ShapeError, match="reassembles maps of 8 channels, got 3"):
        two.reassemble(two.kernels(x, size=(13, 12)), other)


def test_gradients():
    up = lda(channels=4, reduction=1, groups=2, reach=0.3)
    x = torch.randn(1, 4, 2, 3, generator=torch.Generator().manual_seed(2)).double()
    names, parameters = zip(*up.named_parameters(), strict=True)

    def run(x, *values):
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(up, state, (x,), {"size": (4, 5)})

    given = [t.detach().requires_grad_() for t in (x, *parameters)]
    assert torch.autograd.gradcheck(run, given)


def test_no_map_of_all_neighbours_is_made():
    """The largest tensor saved for the backward pass is far below K*K times the result."""
    up = LDAAQU(LDAAQUConfig(channels=64, reduction=16))
    x = torch.randn(1, 64, 8, 8, requires_grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        up(x, size=(64, 64))
    result = 64 * 64 * 64
    assert sum(saved) < 6 * result and max(saved) <= result


def test_what_does_not_fit_is_refused():
    for wrong in ({"kernel_size": 2}, {"mode": "other"}, {"groups": 3}, {"reduction": 3}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            LDAAQUConfig(**({"channels": 8, "reduction": 2} | wrong))
    with pytest.raises(ShapeError, match="one-pixel sizes"):
        lda(mode="official")(features((1, 4)), size=(1, 8))
    with pytest.raises(ShapeError, match=r"size=\(H, W\)"):
        lda()(features())


def test_official_parameters():
    up = lda(mode="official", groups=2, reach=3.0)
    names = {
        "key_bias": "relative_position_bias_table", "query": "proj_q", "key": "proj_k",
        "offset_depthwise": "conv_offset.0", "offset_norm": "conv_offset.1.norm",
        "offset": "conv_offset.3", "norm": "layer_norm.norm",
    }  # fmt: skip
    state = {}
    for name, tensor in up.state_dict().items():
        first, dot, rest = name.partition(".")
        state[names[first] + dot + rest] = tensor
    state[names["key_bias"]] = state[names["key_bias"]][None, :, None]
    again = load_official("lda-aqu", state, ratio=2, range_factor=3)
    x = features((3, 4), batch=1)
    with torch.no_grad():
        torch.testing.assert_close(again(x), literal(up, x, (6, 8)), atol=1e-12, rtol=0)
