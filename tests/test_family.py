"""What holds for every upsampler, at every size it can do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from family import ANY_RATIO, CHANNELS, DOUBLING, Member
from small_training import draw_pictures, options, run

from fmupsample.errors import HeadError, ShapeError, UsageError
from fmupsample.upsamplers import load_head, save_head
from fmupsample.upsamplers.registry import METHODS, any_backbone_names, learned_names

CASES = [
    *((name, member, cells, size) for name, member in ANY_RATIO.items() for cells, size in [
        ((2, 3), (28, 42)), ((3, 4), (3, 4)), ((3, 2), (11, 7)), ((1, 1), (5, 4)),
        ((1, 5), (9, 16)),
    ]),
    *((name, member, cells, size) for name, member in DOUBLING.items() for cells, size in [
        ((4, 5), (8, 10)), ((4, 5), (7, 9)), ((5, 3), (10, 5)),
    ]),
]  # fmt: skip


def _cases(wanted=lambda member: True):
    return pytest.mark.parametrize(
        ("member", "cells", "size"),
        [
            pytest.param(*case[1:], id=f"{case[0]} {case[2]} {case[3]}".replace(", ", "x"))
            for case in CASES
            if wanted(case[1])
        ],
    )


def _members(wanted=lambda member: True):
    both = (("any", ANY_RATIO), ("x2", DOUBLING))
    found = [(f"{name} {kind}", m) for kind, ms in both for name, m in ms.items() if wanted(m)]
    return pytest.mark.parametrize("member", [pytest.param(m, id=name) for name, m in found])


def _linear(member: Member) -> bool:
    return member.make().linear_in_value


def call(up, x, guidance, size):
    with torch.no_grad():
        return up(x, guidance, size=size)


@_cases()
def test_sizes_and_ranges(member: Member, cells, size):
    up = member.make()
    x, guidance = member.inputs(cells, size, batch=2)
    out = call(up, x, guidance, size)
    assert out.shape == (2, CHANNELS, *size) and out.dtype == x.dtype
    assert torch.isfinite(out).all()
    if member.convex:
        low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        assert (out >= low - 1e-9).all() and (out <= high + 1e-9).all()
    if member.constant:
        same = call(up, torch.full_like(x, -1.5), guidance, size)
        torch.testing.assert_close(same, torch.full_like(same, -1.5), atol=1e-9, rtol=0)


@_cases(_linear)
def test_linear_in_value_means_what_it_says(member: Member, cells, size):
    """Any affine map first, or after: the same; and chosen pixels are those of the map."""
    up = member.make()
    x, guidance = member.inputs(cells, size)
    with torch.no_grad():
        weights = up.kernels(x, guidance, size)
        whole = up.reassemble(weights, x)
        torch.testing.assert_close(whole, up(x, guidance, size=size), atol=1e-10, rtol=0)
        mix = torch.randn(3, CHANNELS).double()
        mapped = torch.einsum("vc,bchw->bvhw", mix, x) + 0.7
        expected = torch.einsum("vc,bchw->bvhw", mix, whole) + 0.7
        torch.testing.assert_close(up.reassemble(weights, mapped), expected, atol=1e-10, rtol=0)
        pixels = torch.randint(0, size[0] * size[1], (7,))
        some = up.reassemble_at(weights[0], x[0], pixels)
        torch.testing.assert_close(some, whole[0].flatten(1)[:, pixels].T, atol=1e-10, rtol=0)


@_members(lambda member: member.smooth)
def test_gradients(member: Member):
    up = member.make()
    cells, size = (2, 2), (4, 4)
    x, guidance = member.inputs(cells, size)
    given = [x.requires_grad_()] + ([guidance.requires_grad_()] if member.guidance else [])

    def function(x, guidance=None):
        return up(x, guidance, size=size)

    assert torch.autograd.gradcheck(function, given, fast_mode=True)
    function(*given).square().sum().backward()
    unused = [name for name, p in up.named_parameters() if p.grad is None]
    stack = hasattr(up, "stages")  # of which only the first is needed for this size
    assert all(stack and not name.startswith("stages.0") for name in unused) or all(
        name.startswith("down_vector") for name in unused
    )


@_members(_linear)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features(member: Member, dtype):
    up = member.make().float()
    x, guidance = member.inputs((3, 4), (6, 8))
    guidance = None if guidance is None else guidance.float()
    halves = x.to(dtype)
    out = call(up, halves, guidance, (6, 8))
    exact = call(up, halves.float(), guidance, (6, 8))
    assert out.dtype == dtype
    assert (out.float() - exact).abs().max() < 4 * torch.finfo(dtype).eps * x.abs().max()


@_members()
def test_wrong_arguments_are_named(member: Member):
    up = member.make()
    x, guidance = member.inputs((3, 4), (6, 8))
    with pytest.raises(ShapeError, match=r"\[B, C, h, w\]"):
        up(x[0], guidance, size=(6, 8))
    with pytest.raises(ShapeError, match="smaller than the features"):
        up(x, guidance, size=(2, 8))
    if member.guidance:
        with pytest.raises(ShapeError, match="needs a guidance"):
            up(x, size=(6, 8))
        with pytest.raises(ShapeError, match="swapped"):
            up(guidance, x)
    if up.fixed_ratio:
        with pytest.raises(ShapeError, match="exactly 2 times"):
            up(x, guidance, size=(9, 8))
        if not member.guidance:
            assert up(x).shape[2:] == (6, 8)
    if any(True for _ in up.parameters()):
        with pytest.raises(ShapeError, match=r"built for 8 channels|2 heads: 5 channels"):
            up(x[:, :5], guidance, size=(6, 8))


@_members()
def test_every_class_states_what_it_is(member: Member):
    up = member.make()
    for name, kinds in {
        "needs_guidance": bool, "linear_in_value": bool, "fuses_skip": bool,
        "guidance_is_image": bool, "uses_ops": bool, "fixed_ratio": int | None, "name": str,
    }.items():  # fmt: skip
        assert isinstance(getattr(up, name), kinds), name
    assert up.needs_guidance == bool(member.guidance)


# --- those with heads -----------------------------------------------------------------------------

_SMALL_RESFU = {"embedding": 8, "middle": 16, "groups": 2, "norm_groups": 2, "guidance_channels": 4}
SMALL = {
    "affinity": {"embedding": 8, "width": 8, "detail": 4, "key_width": 8},
    "anyup": {"embedding": 16},
    "jafar": {"embedding": 16},
    "naf": {"embedding": 16},
    "uplift": {"width": 2, "guide": 8},
    "resfu": _SMALL_RESFU,
    "bilateral-cells": {"embedding": 8, "norm_groups": 2, "guidance_channels": 4},
    "sapa": {"embedding": 8, "guidance_channels": 4},
    "fade": {"compressed": 8, "guidance_channels": 4},
    "carafe": {"stages": 3, "operator": {"compressed": 8}},
    "dysample": {"stages": 3},
    "featup": {"stages": 3, "operator": {"embedding": 8, "kernel_size": 3}},
    "deconvolution": {"stages": 3, "operator": {"groups": 16}},
    "pixel-shuffle": {"stages": 3},
    "lda-aqu": {"reduction": 2},
}


def _channels(name: str) -> int:
    return 0 if name in any_backbone_names() else 16


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return draw_pictures(tmp_path_factory.mktemp("family"), 6)


@pytest.mark.parametrize("name", learned_names())
def test_every_learned_one_is_trained_saved_and_loaded(name, pictures, tmp_path):
    path = tmp_path / "head.safetensors"
    config = options(upsampler=name, upsampler_config=SMALL[name], steps=4, validate_every=2)
    report = run(pictures, path, config)
    assert report.score is not None and report.score.ratio > 0
    head = load_head(path)
    # Where both are possible, a head of one's own is trained.
    assert head.config.channels == (16 if METHODS[name].own_heads else _channels(name))
    assert head.name == name
    x, image = torch.randn(1, 16, 4, 4), torch.randn(1, 3, 30, 33)
    assert head(x, image).shape == (1, 16, 30, 33)
    untrained = METHODS[name].build(head.config.to_dict())
    torch.manual_seed(config.seed)
    assert [n for n, _ in untrained.named_parameters()] == [n for n, _ in head.named_parameters()]


@pytest.mark.parametrize("name", learned_names())
def test_configurations_are_checked(name, tmp_path):
    with pytest.raises(UsageError, match="nonsense"):
        METHODS[name].build({"channels": 16, "nonsense": 1})
    up = METHODS[name].build(METHODS[name].options(16, SMALL[name]))
    backbone = SimpleNamespace(
        name="toy", layer=0, channels=16, stride=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3,
        fingerprint="0",
    )  # fmt: skip
    path = tmp_path / "h.safetensors"
    save_head(path, up, backbone if _channels(name) else None)
    again = load_head(path, backbone)
    assert again.config == up.config
    for key, value in up.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value)
    backbone.stride, backbone.channels = (16, 16), 24
    if not _channels(name):
        image = torch.randn(1, 3, 32, 48)
        assert load_head(path, backbone)(torch.randn(1, 24, 2, 3), image).shape == (1, 24, 32, 48)
        return
    with pytest.raises(HeadError, match="another backbone"):
        load_head(path, backbone)
