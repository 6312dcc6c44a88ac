"""Upsamplers that are not by similarity, each against its definition written out."""

from __future__ import annotations

from math import floor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference.neighbours import gathered, nearest

from fmupsample.errors import HeadError, ShapeError, UsageError
from fmupsample.upsamplers import (
    CARAFE,
    FADE,
    CARAFEConfig,
    CARAFEStack,
    Deconvolution,
    DeconvolutionConfig,
    DySample,
    DySampleConfig,
    FADEConfig,
    GuidedFilter,
    LearnedBilateral,
    LearnedBilateralConfig,
    LearnedBilateralStack,
    PixelShuffle,
    PixelShuffleConfig,
    StackConfig,
    load_official,
)

EXACT = {"atol": 1e-12, "rtol": 0}


def scrambled(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.double().eval()


def maps(*shapes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).double() for shape in shapes]


def renamed(module, names, extra=None):
    """The module's parameters under the names of the official one."""
    state = {}
    for name, tensor in module.state_dict().items():
        for ours, theirs in names.items():
            if name == ours or name.startswith(f"{ours}."):
                state[theirs + name[len(ours) :]] = tensor
    assert len(state) == len(module.state_dict())
    return state | (extra or {})


# --- DySample -------------------------------------------------------------------------------------


def dysample(up, x):
    """Pixel by pixel: the bilinear sample at its own place plus its group's offset."""
    c, (h, w) = up.config, x.shape[2:]
    r, groups = c.ratio, c.groups
    source = F.pixel_shuffle(x, r) if c.style == "pl" else x
    offset = F.conv2d(source, up.offset.weight, up.offset.bias)
    if up.scope is not None:
        offset = offset * 0.5 * F.conv2d(source, up.scope.weight, up.scope.bias).sigmoid()
    else:
        offset = offset * 0.25
    out = torch.zeros(len(x), x.shape[1], h * r, w * r).double()
    own = x.shape[1] // groups
    for b in range(len(x)):
        for p in range(h * r):
            for q in range(w * r):
                for g in range(groups):
                    if c.style == "pl":
                        dx, dy = offset[b, g, p, q], offset[b, groups + g, p, q]
                    else:
                        place = (p % r) * r + q % r
                        dx = offset[b, g * r * r + place, p // r, q // r]
                        dy = offset[b, (groups + g) * r * r + place, p // r, q // r]
                    row = min(max((p + 0.5) / r - 0.5 + dy.item(), 0), h - 1)
                    column = min(max((q + 0.5) / r - 0.5 + dx.item(), 0), w - 1)
                    for i in (floor(row), floor(row) + 1):
                        for j in (floor(column), floor(column) + 1):
                            share = (1 - abs(row - i)) * (1 - abs(column - j))
                            if share > 0 and i < h and j < w:
                                part = slice(g * own, (g + 1) * own)
                                out[b, part, p, q] += share * x[b, part, i, j]
    return out


@pytest.mark.parametrize("style", ["lp", "pl"])
@pytest.mark.parametrize(("ratio", "groups"), [(2, 4), (3, 1)])
@pytest.mark.parametrize("scope", [False, True])
def test_dysample(style, ratio, groups, scope):
    channels = 2 * groups * (ratio**2 if style == "pl" else 1)
    config = DySampleConfig(channels, ratio, style, groups, dynamic_scope=scope)
    up = scrambled(DySample(config))
    (x,) = maps((1, channels, 3, 4))
    expected = dysample(up, x)
    torch.testing.assert_close(up(x), expected, **EXACT)
    state = renamed(up, {"offset": "offset", "scope": "scope"}, {"init_pos": torch.zeros(1)})
    assert "scope.bias" not in state  # as in the official module
    again = load_official("dysample", state, scale=ratio, style=style, groups=groups)
    torch.testing.assert_close(again(x), expected, **EXACT)


def test_dysample_begins_as_bilinear():
    (x,) = maps((1, 8, 4, 5))
    up = DySample(DySampleConfig(8)).double()
    torch.nn.init.zeros_(up.offset.weight)
    expected = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(up(x), expected, **EXACT)
    for wrong in ({"groups": 3}, {"style": "xy"}, {"style": "pl", "ratio": 3}):
        with pytest.raises(UsageError):
            DySampleConfig(8, **wrong)
    with pytest.raises(ShapeError, match="reassembles maps of 8 channels"):
        up.reassemble(up.kernels(x), x[:, :4])


# --- CARAFE and FADE ------------------------------------------------------------------------------


def softmax(scores, there, border):
    shares = scores.exp() * (there if border == "masked" else 1)
    return shares / shares.sum(1, keepdim=True) * there


@pytest.mark.parametrize("border", ["masked", "zeros"])
@pytest.mark.parametrize("ratio", [2, 3])
def test_carafe(border, ratio):
    up = scrambled(CARAFE(CARAFEConfig(6, ratio, compressed=4, kernel_size=3, border=border)))
    (x,) = maps((2, 6, 3, 4))
    scores = F.conv2d(F.conv2d(x, up.compress.weight, up.compress.bias), up.encode.weight,
                      up.encode.bias, padding=1)  # fmt: skip
    scores = F.pixel_shuffle(scores, ratio)
    values, there = gathered(x, tuple(scores.shape[2:]), 3)
    expected = (values * softmax(scores, there, border)[:, None]).sum(2)
    torch.testing.assert_close(up(x), expected, **EXACT)
    if border == "zeros":
        names = {"compress": "channel_compressor", "encode": "content_encoder"}
        again = load_official("carafe", renamed(up, names), scale_factor=ratio, up_kernel=3)
        torch.testing.assert_close(again(x), expected, **EXACT)
        with pytest.raises(HeadError, match="2 groups"):
            load_official("carafe", renamed(up, names), up_group=2)


@pytest.mark.parametrize("lite", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_fade(lite, gate):
    config = FADEConfig(
        6, 6, stem=False, gate=gate, kernel_size=3, compressed=4, lite=lite, border="zeros"
    )
    up = scrambled(FADE(config))
    x, y = maps((2, 6, 3, 4), (2, 6, 6, 8))
    groups = 9 if lite else 1

    def encoded(t, layer):
        hidden = F.conv2d(t, layer.weight, layer.bias)
        return F.conv2d(hidden, up.encode.weight, up.encode.bias, padding=1, groups=groups)

    size = (6, 8)
    scores = encoded(y, up.compress_guidance) + nearest(encoded(x, up.compress_features), size)
    values, there = gathered(x, size, 3)
    expected = (values * softmax(scores, there, "zeros")[:, None]).sum(2)
    if gate:
        g = torch.sigmoid(nearest(F.conv2d(x, up.gate.weight, up.gate.bias), size))
        expected = g * y + (1 - g) * expected
    assert up.fuses_skip == gate and not up.linear_in_value
    torch.testing.assert_close(up(x, y), expected, **EXACT)
    names = {
        "gate": "gate_generator.conv", "compress_guidance": "ker_generator.compressor_en",
        "compress_features": "ker_generator.compressor_de",
        "encode": "ker_generator.content_encoder",
    }  # fmt: skip
    again = load_official("fade", renamed(up, names))
    torch.testing.assert_close(again(x, y), expected, **EXACT)
    with pytest.raises(UsageError, match="passes the guidance on"):
        FADEConfig(6, 5, stem=False, gate=True)


# --- joint bilateral, guided filter ---------------------------------------------------------------


def learned_bilateral(up, x, guidance):
    """FeatUp's stage, neighbour by neighbour, with mirrored borders."""
    size, k = tuple(guidance.shape[2:]), up.config.kernel_size

    def two(layers, t):
        hidden = F.gelu(F.conv2d(t, layers[0].weight, layers[0].bias))
        return F.conv2d(hidden, layers[1].weight, layers[1].bias)

    def around(t):
        t = F.pad(t, (k // 2,) * 4, mode="reflect")
        return torch.stack(
            [t[:, :, i : i + size[0], j : j + size[1]] for i in range(k) for j in range(k)], 2
        )

    projected = two(up.project, guidance)
    scores = (around(projected) * projected[:, :, None]).sum(1) * up.temperature.exp()
    steps = torch.linspace(-1, 1, k, dtype=torch.float64)
    squares = (steps[:, None] ** 2 + steps**2).flatten()
    distance = torch.exp(-squares / (2 * up.sigma**2))
    weights = scores.softmax(1) * distance[:, None, None]
    weights = weights / weights.sum(1, keepdim=True)
    if up.correct is not None:
        weights = weights + 0.1 * two(up.correct, torch.cat([weights, guidance], 1))
    fine = F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=False)
    return (around(fine) * weights[:, None]).sum(2)


@pytest.mark.parametrize("correction", [False, True])
def test_learned_bilateral(correction):
    config = LearnedBilateralConfig(6, kernel_size=5, embedding=4, correction=correction)
    up = scrambled(LearnedBilateral(config))
    x, image = maps((2, 6, 4, 5), (2, 3, 8, 10))
    torch.testing.assert_close(up(x, image), learned_bilateral(up, x, image), **EXACT)


def test_featup_is_a_stack_of_these():
    config = StackConfig(6, stages=2, operator={"kernel_size": 3, "embedding": 4})
    up = scrambled(LearnedBilateralStack(config))
    x, image = maps((1, 6, 4, 5), (1, 3, 16, 20))
    expected = learned_bilateral(up.stages[0], x, F.avg_pool2d(image, 2))
    expected = learned_bilateral(up.stages[1], expected, image)
    expected = expected + 0.1 * F.conv2d(expected, up.correct.weight, up.correct.bias)
    torch.testing.assert_close(up(x, image), expected, **EXACT)
    names = {"correct": "fixup_proj.1"}
    for n in range(2):
        for ours, theirs in {
            "temperature": "range_temp", "sigma": "sigma_spatial", "project.0": "range_proj.0",
            "project.1": "range_proj.3", "correct.0": "fixup_proj.0", "correct.1": "fixup_proj.3",
        }.items():  # fmt: skip
            names[f"stages.{n}.{ours}"] = f"up{n + 1}.{theirs}"
    again = load_official("featup", renamed(up, names))
    torch.testing.assert_close(again(x, image), expected, **EXACT)


def test_guided_filter():
    """Against the definition: least squares in every window, averaged, upsampled, applied."""
    x, image = maps((1, 2, 4, 5), (1, 3, 12, 20))
    up = GuidedFilter(radius=1, eps=0.2)
    guide = F.adaptive_avg_pool2d(image, (4, 5))[0].numpy()
    target = x[0].numpy()

    def window(t, i, j):
        part = t[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
        return part.reshape(len(t), -1)

    fits = np.zeros((4, 5, 2, 4))  # slopes and offset for each channel
    for i in range(4):
        for j in range(5):
            g, t = window(guide, i, j), window(target, i, j)
            centred = g - g.mean(1, keepdims=True)
            cov = centred @ centred.T / g.shape[1] + 0.2 * np.eye(3)
            for v in range(2):
                a = np.linalg.solve(cov, centred @ (t[v] - t[v].mean()) / g.shape[1])
                fits[i, j, v] = [*a, t[v].mean() - a @ g.mean(1)]
    flat = fits.reshape(4, 5, -1).transpose(2, 0, 1)
    mean = np.stack([[window(flat, i, j).mean(1) for j in range(5)] for i in range(4)])
    fields = F.interpolate(
        torch.tensor(mean.transpose(2, 0, 1))[None], (12, 20), mode="bilinear", align_corners=False
    ).unflatten(1, (2, 4))
    expected = (fields[:, :, :3] * image[:, None]).sum(2) + fields[:, :, 3]
    torch.testing.assert_close(up(x, image), expected, atol=1e-10, rtol=0)
    with pytest.raises(UsageError, match="radius"):
        GuidedFilter(radius=0)


def test_guided_filter_follows_the_edge_of_the_picture():
    x = torch.tensor([0.0, 0.0, 0.6, 1.0, 1.0]).expand(1, 1, 5, 5).contiguous()
    image = torch.zeros(1, 3, 40, 40)
    image[..., 19:] = 3.0
    out = GuidedFilter(eps=0.01)(x, image)[0, 0, 20]
    smooth = F.interpolate(x, (40, 40), mode="bilinear", align_corners=False)[0, 0, 20]
    assert (out[19] - out[18]) > 3 * (smooth[19] - smooth[18])


# --- convolutions ---------------------------------------------------------------------------------


def test_convolutions_begin_as_interpolations():
    (x,) = maps((2, 6, 4, 5))
    for ratio in (2, 4):
        bilinear = F.interpolate(x, scale_factor=ratio, mode="bilinear", align_corners=False)
        for groups in (1, 6):
            up = Deconvolution(DeconvolutionConfig(6, ratio, groups)).double()
            torch.testing.assert_close(up(x), bilinear, **EXACT)
        blocks = F.interpolate(x, scale_factor=ratio, mode="nearest")
        up = PixelShuffle(PixelShuffleConfig(6, ratio)).double()
        torch.testing.assert_close(up(x), blocks, **EXACT)


def test_convolutions_are_those_of_torch_inside():
    (x,) = maps((2, 6, 5, 6))
    up = scrambled(Deconvolution(DeconvolutionConfig(6)))
    inside = up.layer(x)[:, :, 2:-2, 2:-2]
    torch.testing.assert_close(up(x)[:, :, 2:-2, 2:-2], inside, **EXACT)
    up = scrambled(PixelShuffle(PixelShuffleConfig(6)))
    inside = F.pixel_shuffle(up.layer(x), 2)
    torch.testing.assert_close(up(x)[:, :, 2:-2, 2:-2], inside, **EXACT)


# --- stacks ---------------------------------------------------------------------------------------


def test_a_stack_stops_when_it_is_large_enough():
    up = scrambled(CARAFEStack(StackConfig(6, stages=4, operator={"compressed": 4})))
    (x,) = maps((1, 6, 3, 4))
    first, second = up.stages[0](x), up.stages[1](up.stages[0](x))
    torch.testing.assert_close(up(x, size=(6, 8)), first, **EXACT)
    resized = F.interpolate(second, (10, 9), mode="bilinear", align_corners=False, antialias=True)
    torch.testing.assert_close(up(x, size=(10, 9)), resized, **EXACT)
    assert up(x, size=(42, 56)).shape[2:] == (42, 56)  # ratio 14: four stages, then resized
    assert up(x, size=(60, 90)).shape[2:] == (60, 90)
    for wrong in ({"stages": 0}, {"operator": 3}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            StackConfig(6, **wrong)
