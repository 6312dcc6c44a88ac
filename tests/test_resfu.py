"""ReSFU: the fast module against the literal definition, and its switches."""

import itertools

import pytest
import torch
from reference.resfu import KERNEL
from reference.resfu import resfu as literal

import fmupsample
from fmupsample.errors import HeadError, ShapeError, UsageError
from fmupsample.upsamplers import ReSFU, ReSFUConfig, load_official


def official_state(channels, guidance, *, embedding=32, middle=128, groups=4, seed=0):
    """Random parameters under the official names and shapes, GroupNorm affines included."""
    generator = torch.Generator().manual_seed(seed)

    def r(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    state = {
        "norm_x.weight": 1 + 0.3 * r(channels),
        "norm_x.bias": 0.3 * r(channels),
        "norm_y.weight": 1 + 0.3 * r(guidance),
        "norm_y.bias": 0.3 * r(guidance),
        "GF.kernel": torch.ones(embedding, 1, 1, 9),
        "q.weight": r(embedding, guidance, 1, 1) / guidance**0.5,
        "q.bias": 0.3 * r(embedding),
        "k.weight": r(embedding, channels, 1, 1) / channels**0.5,
        "k.bias": 0.3 * r(embedding),
    }
    for pair in ("semantic_scores", "detail_scores"):
        c = f"{pair}.channel_compressor"
        state |= {
            f"{pair}.weight": r(middle, embedding // groups, KERNEL, KERNEL) / 8,
            f"{pair}.bias": 0.3 * r(1, middle, 1, 1),
            f"{pair}.norm.weight": 1 + 0.3 * r(embedding),
            f"{pair}.norm.bias": 0.3 * r(embedding),
            f"{c}.1.weight": r(middle, middle // groups, 1, 1) / 5,
            f"{c}.1.bias": 0.3 * r(middle),
            f"{c}.3.weight": 1 + 0.3 * r(middle),
            f"{c}.3.bias": 0.3 * r(middle),
            f"{c}.4.weight": r(KERNEL**2, middle, 1, 1) / 6,
            f"{c}.4.bias": r(KERNEL**2),
        }
    return state


def inputs(channels, guidance, cells, ratio, batch=2):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(batch, channels, *cells, generator=generator, dtype=torch.float64)
    size = [n * ratio for n in cells]
    return x, torch.randn(batch, guidance, *size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("channels", "guidance", "cells", "ratio"),
    [
        (64, 32, (6, 5), 4),
        (24, 16, (3, 4), 14),
        (8, 8, (5, 4), 1),
        (8, 8, (1, 1), 6),
        (8, 16, (4, 3), 7),
    ],
)
def test_fast_module_equals_the_literal_definition(channels, guidance, cells, ratio):
    state = official_state(channels, guidance)
    x, y = inputs(channels, guidance, cells, ratio)
    expected, weights = literal(state, x, y)
    up = load_official("resfu", state, ratio=ratio, groups=4, embedding_dim=32, kernel_size=3)
    torch.testing.assert_close(up.kernels(x, y), weights, atol=1e-11, rtol=0)
    torch.testing.assert_close(up(x, y), expected, atol=1e-11, rtol=0)


def test_float32_stays_near_float64():
    state = official_state(24, 16)
    x, y = inputs(24, 16, (6, 7), 14, batch=1)
    up = load_official("resfu", state)
    exact = up(x, y)
    single = up.float()(x.float(), y.float())
    assert single.dtype == torch.float32
    assert (single.double() - exact).abs().max() < 2e-5


@pytest.mark.parametrize("ratio", [4, 14])
def test_float32_weights_stay_near_float64(ratio):
    up = load_official("resfu", official_state(24, 16))
    x, y = inputs(24, 16, (6, 7), ratio, batch=1)
    exact = up.kernels(x, y)
    single = up.float().kernels(x.float(), y.float())
    assert (single.double() - exact).abs().max() < 2e-5  # weights are at most 1


def test_what_autograd_does_not_see_is_the_same(monkeypatch):
    """Without gradients memory is used again, and maps are worked on a few channels at a time."""
    from fmupsample.layers import chunks

    up = load_official("resfu", official_state(8, 8))
    for parameter in up.parameters():
        parameter.requires_grad_()
    x, y = inputs(8, 8, (5, 4), 9)
    seen = up.kernels(x, y)
    assert seen.requires_grad
    for size in (1, 1 << 30):
        monkeypatch.setattr(chunks, "_CHUNK_BYTES", size)
        with torch.no_grad():
            torch.testing.assert_close(up.kernels(x, y), seen.detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_give_half_precision_results(dtype):
    up = load_official("resfu", official_state(24, 16)).float()
    x, y = (t.float() for t in inputs(24, 16, (3, 4), 8, batch=1))
    out = up(x.to(dtype), y)
    assert out.dtype == dtype
    # The scores are computed in float32: what differs is the rounding of x and of the result.
    expected = up(x.to(dtype).float(), y)
    assert (out.float() - expected).abs().max() < 2 * torch.finfo(dtype).eps * x.abs().max()


def test_strips_do_not_show(monkeypatch):
    from fmupsample.upsamplers.resfu import scores

    up = load_official("resfu", official_state(8, 8))
    x, y = inputs(8, 8, (5, 4), 9)
    whole = up(x, y)
    monkeypatch.setitem(scores._STRIP_BYTES, "cpu", 1)
    torch.testing.assert_close(up(x, y), whole, atol=1e-12, rtol=0)


def small(**changes):
    torch.manual_seed(0)
    config = ReSFUConfig(channels=6, embedding=8, middle=16, groups=2, norm_groups=4, **changes)
    return ReSFU(config).double()


@pytest.mark.parametrize("size", [(13, 17), (10, 20), (5, 7), (6, 29)])
def test_any_ratio_from_one_on(size):
    up = small()
    x, image = torch.randn(2, 6, 5, 7).double(), torch.randn(2, 3, *size).double()
    weights = up.kernels(x, image)
    assert weights.shape == (2, 9, *size)
    torch.testing.assert_close(weights.sum(1), torch.ones(2, *size).double())
    assert torch.isfinite(up(x, image)).all()


def test_ratio_is_continuous_in_the_semantic_pair():
    # The semantic keys are sampled exactly at fractional ratios: an upsampled map of a linear ramp
    # must not jump between 13 and 14 pixels a cell.
    up = small(detail=False, align=False)
    x = torch.linspace(-1, 1, 8).double().expand(1, 6, 4, 8).contiguous()
    flat = torch.zeros(1, 3, 56, 112).double()
    near = torch.zeros(1, 3, 56, 111).double()
    a = torch.nn.functional.interpolate(up(x, flat), (56, 111), mode="bilinear")
    assert (a - up(x, near)).abs().max() < 0.02


def test_ablations_are_all_different_and_all_convex():
    x, image = torch.randn(1, 6, 4, 5).double(), torch.randn(1, 3, 28, 35).double()
    seen = []
    for pairs, align, similarity, neighbours in itertools.product(
        [(True, True), (True, False), (False, True)],
        [True, False],
        ["pcdc", "inner"],
        ["fine", "coarse"],
    ):
        up = small(
            semantic=pairs[0],
            detail=pairs[1],
            align=align,
            similarity=similarity,
            neighbours=neighbours,
        )
        out = up(x, image)
        assert out.min() >= x.min() - 1e-9
        assert out.max() <= x.max() + 1e-9
        assert all((out - other).abs().max() > 1e-6 for other in seen)
        seen.append(out)


@pytest.mark.parametrize(
    "options",
    [
        {"similarity": "pcdc"},
        {"similarity": "inner"},
        {"neighbours": "coarse"},
    ],
    ids=str,
)
def test_gradients(options):
    up = small(**options)
    x = torch.randn(1, 6, 2, 3).double().requires_grad_()
    image = torch.randn(1, 3, 6, 9).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: up(a, b).square().mean(), (x, image), atol=1e-6)
    up(x, image).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in up.parameters())
    assert sum(bool((p.grad != 0).any()) for p in up.parameters()) >= len(list(up.parameters())) - 1


def test_value_first_equals_materialised_first():
    up = small()
    x, image = torch.randn(1, 6, 4, 5).double(), torch.randn(1, 3, 31, 44).double()
    matrix = torch.randn(3, 6).double()
    weights = up.kernels(x, image)
    first = up.reassemble(weights, torch.einsum("oc,bchw->bohw", matrix, x))
    torch.testing.assert_close(first, torch.einsum("oc,bchw->bohw", matrix, up(x, image)))


def test_decoder_form_takes_any_guidance_and_states_it():
    up = small(stem=False, guidance_channels=5)
    assert not up.guidance_is_image
    assert up(torch.randn(1, 6, 3, 3).double(), torch.randn(1, 5, 12, 9).double()).shape == (
        1,
        6,
        12,
        9,
    )


def test_size_other_than_the_guidance():
    up = small()
    x, image = torch.randn(1, 6, 4, 4).double(), torch.randn(1, 3, 32, 32).double()
    assert up(x, image, size=(16, 20)).shape == (1, 6, 16, 20)
    assert up(x, image, size=(50, 64)).shape == (1, 6, 50, 64)


def test_wrong_inputs_are_named():
    up = small()
    x, image = torch.randn(1, 6, 4, 4).double(), torch.randn(1, 3, 32, 32).double()
    with pytest.raises(ShapeError, match="swapped"):
        up(image, x)
    with pytest.raises(ShapeError, match="6 channels, got 5"):
        up(x[:, :5], image)
    with pytest.raises(ShapeError, match="3 channels, got 4"):
        up(x, torch.randn(1, 4, 32, 32).double())
    with pytest.raises(ShapeError, match="needs a guidance"):
        up(x)
    with pytest.raises(ShapeError, match="batch"):
        up(x, image.expand(2, -1, -1, -1))
    with pytest.raises(ShapeError, match="smaller"):
        up(x, image, size=(2, 64))


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel_size": 2},
        {"similarity": "cosine"},
        {"neighbours": "all"},
        {"semantic": False, "detail": False},
        {"embedding": 12},
    ],
)
def test_wrong_configurations_are_refused(changes):
    with pytest.raises(UsageError):
        ReSFUConfig(channels=8, **changes)


def test_unknown_configuration_keys_are_named():
    with pytest.raises(UsageError, match="heads"):
        ReSFUConfig.from_dict({"channels": 8, "heads": 4})


def test_load_official_names_what_is_wrong():
    state = official_state(8, 8)
    del state["q.bias"]
    state["extra"] = torch.zeros(1)
    with pytest.raises(HeadError, match=r"missing \['query.bias'\], unexpected \['extra'\]"):
        load_official("resfu", state)
    with pytest.raises(UsageError, match="sorcery"):
        load_official("sorcery", state)
    state = official_state(8, 8)
    state["k.weight"] = torch.zeros(32, 9, 1, 1)
    with pytest.raises(HeadError, match=r"key\.weight"):
        fmupsample.load_official("resfu", state)


def test_larger_kernels():
    up = small(kernel_size=5)
    out = up(torch.randn(1, 6, 3, 4).double(), torch.randn(1, 3, 21, 28).double())
    assert out.shape == (1, 6, 21, 28)
    assert torch.isfinite(out).all()


def test_bfloat16_features_cost_little_accuracy():
    """With them the score products are in bfloat16: no more error than rounding the features is."""
    torch.manual_seed(0)
    head = ReSFU(ReSFUConfig(channels=48)).requires_grad_(False)
    x, image = torch.randn(1, 48, 8, 8).bfloat16(), torch.randn(1, 3, 112, 112)
    exact = head.double().kernels(x.double(), image.double())
    head.float()
    single, half = head.kernels(x.float(), image), head.kernels(x, image)
    assert (single.double() - exact).abs().max() < 2e-5
    assert not torch.equal(single, half)
    assert (half.double() - exact).abs().max() < 0.03
    assert (half.double() - exact).square().mean().sqrt() < 0.004
    torch.testing.assert_close(half.sum(1), torch.ones(1, 112, 112))


def test_gradients_are_never_in_low_precision():
    head = ReSFU(ReSFUConfig(channels=16))
    x, image = torch.randn(1, 16, 4, 4).bfloat16(), torch.randn(1, 3, 28, 28)
    torch.testing.assert_close(head.kernels(x, image), head.kernels(x.float(), image))
