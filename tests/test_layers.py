"""The shortcuts of the layers against what they abbreviate."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fmupsample.layers.filters import (
    box_mean,
    fast_guided_filter,
    gaussian3,
    pooled_box_mean,
    upsampled_on_half_grid,
)
from fmupsample.layers.moments import (
    affine,
    apply_affine,
    group_moments,
    largest_group_count,
    pointwise_after_norm,
    pooled_moments,
    upsampled_group_moments,
)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).double()


@pytest.mark.parametrize(("channels", "groups"), [(384, 32), (24, 24), (48, 24), (7, 7), (100, 25)])
def test_largest_group_count(channels, groups):
    assert largest_group_count(channels) == groups


@settings(max_examples=40)
@given(st.integers(1, 7), st.integers(1, 7), st.floats(1, 9), st.floats(1, 9))
def test_moments_of_an_upsampled_map_need_no_upsampling(h, w, ry, rx):
    size = (max(h, round(h * ry)), max(w, round(w * rx)))
    x = random(2, 6, h, w) + 5
    up = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    for got, want in zip(upsampled_group_moments(x, size, 3), group_moments(up, 3), strict=True):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=0)


def test_pooled_moments_are_those_of_the_whole():
    x = random(2, 6, 10, 4)
    parts = [x[:, :, :3], x[:, :, 3:4], x[:, :, 4:]]
    pooled = pooled_moments([group_moments(p, 2) for p in parts], [12, 4, 24])
    for got, want in zip(pooled, group_moments(x, 2), strict=True):
        torch.testing.assert_close(got, want)


def test_affine_is_group_norm():
    norm = torch.nn.GroupNorm(3, 6).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = random(2, 6, 5, 4)
    mapped = apply_affine(x, *affine(norm, *group_moments(x, 3)))
    torch.testing.assert_close(mapped, norm(x))


def test_pointwise_after_norm_is_a_convolution_after_a_norm():
    norm, conv = torch.nn.GroupNorm(3, 6).double(), torch.nn.Conv2d(6, 4, 1).double()
    torch.nn.init.normal_(norm.weight)
    x = random(2, 6, 5, 4)
    got = pointwise_after_norm(x, norm, conv.weight.flatten(1), conv.bias)
    torch.testing.assert_close(got, conv(norm(x)))


@pytest.mark.parametrize("radius", [0, 1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [(1, 1), (3, 11), (16, 9)])
def test_box_mean_divides_by_the_pixels_inside(radius, size):
    x = random(1, 2, *size)
    expected = torch.empty_like(x)
    for i in range(size[0]):
        for j in range(size[1]):
            rows = slice(max(0, i - radius), i + radius + 1)
            columns = slice(max(0, j - radius), j + radius + 1)
            expected[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
    torch.testing.assert_close(box_mean(x, radius), expected)
    torch.testing.assert_close(pooled_box_mean(x, radius), expected)


def test_gaussian_keeps_constants_and_is_the_discrete_one():
    torch.testing.assert_close(
        gaussian3(torch.full((1, 1, 4, 5), 3.0)), torch.full((1, 1, 4, 5), 3.0)
    )
    impulse = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    impulse[..., 2, 2] = 1
    out = gaussian3(impulse)[0, 0]
    assert out.sum() == pytest.approx(1)
    assert (out[2, 1] / out[2, 2]).item() == pytest.approx(torch.e**-0.5)
    assert (out[1, 1] / out[2, 2]).item() == pytest.approx(torch.e**-1)


@pytest.mark.parametrize("size", [(8, 10), (9, 11), (1, 1), (2, 1)])
def test_half_grid_of_an_upsampled_map(size):
    x = random(1, 2, 1, 1) if size[0] < 3 else random(1, 2, 3, 4)
    up = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    if min(size) > 1:
        up = F.interpolate(up, scale_factor=0.5, mode="nearest")
    else:
        up = up[:, :, ::2, ::2]
    torch.testing.assert_close(upsampled_on_half_grid(x, size), up)


def test_guided_filter_returns_an_affine_function_of_the_guide_unchanged():
    guide = random(1, 3, 24, 32)
    target = 2.5 * guide - 1
    out = fast_guided_filter(guide, target[:, :, ::2, ::2], radius=4, eps=1e-9)
    torch.testing.assert_close(out, target, atol=1e-6, rtol=0)


def test_guided_filter_of_a_flat_guide_is_a_smooth_target():
    out = fast_guided_filter(torch.ones(1, 1, 32, 32).double(), random(1, 1, 16, 16), 4, 1e-3)
    assert out.std() < 0.3 * random(1, 1, 16, 16).std()


@pytest.mark.parametrize("budget", [1, 3 * 8 * 6 * 5, 1 << 30])
def test_working_on_a_few_channels_at_a_time_is_the_same(monkeypatch, budget):
    from fmupsample.layers import chunks

    monkeypatch.setattr(chunks, "_CHUNK_BYTES", budget)
    x, half = random(2, 7, 6, 5), random(2, 7, 3, 2)
    whole = torch.addcmul(half.mean((2, 3), keepdim=True), x, x)

    def function(some, of_half):
        return torch.addcmul(of_half.mean((2, 3), keepdim=True), some, some)

    torch.testing.assert_close(chunks.over_channels(function, x, half), whole)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(chunks.over_channels(function, x, half).sum(), x)
    torch.testing.assert_close(grad, 2 * x.detach())


def test_moments_may_use_the_memory_of_their_map():
    x = random(2, 6, 5, 4)
    for got, want in zip(
        group_moments(x.clone(), 3, overwrite=True), group_moments(x, 3), strict=True
    ):
        torch.testing.assert_close(got, want)
    x.requires_grad_()
    for got, want in zip(group_moments(x, 3), group_moments(x.detach(), 3), strict=True):
        torch.testing.assert_close(got.detach(), want)
