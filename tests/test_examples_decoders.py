"""The decoders of the examples: odd sizes, every method, and better edges than nearest."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from family import decoders

from fmupsample.errors import UsageError
from fmupsample.upsamplers import DECODER_UPSAMPLERS, build_for_decoder

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


def test_the_scenes_are_what_they_say(example):
    scenes = example("scenes")
    drawn, again = scenes.draw_scenes(3, (40, 56)), scenes.draw_scenes(3, (40, 56))
    assert torch.equal(drawn.image, again.image) and drawn.image.shape == (3, 3, 40, 56)
    assert set(drawn.labels.unique().tolist()) <= {0, 1, 2}
    assert drawn.alpha.min() >= 0 and drawn.alpha.max() <= 1 and drawn.depth.min() > 0
    near = scenes.boundary(drawn.labels, 1)
    assert not near.any()  # a window of one pixel sees one label
    changes = drawn.labels[:, :, 1:] != drawn.labels[:, :, :-1]
    near = scenes.boundary(drawn.labels, 2)
    assert near[:, :, 1:][changes].all() and near[:, :, :-1][changes].all()
    assert near.float().mean() < 0.5


@pytest.mark.parametrize("name", DECODER_UPSAMPLERS + decoders.ENCODER_UPSAMPLERS)
def test_every_method_fits_an_odd_decoder(name):
    up = decoders.build(name, 16)
    x, lateral = torch.randn(2, 16, 5, 7), torch.randn(2, 16, 9, 14)
    out = up(x.requires_grad_(), lateral)
    assert out.shape == lateral.shape
    out.sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("name", DECODER_UPSAMPLERS)
def test_direct_ratios(name):
    for ratio in (4, 8):
        up = build_for_decoder(name, 16, 16, ratio)
        lateral = torch.randn(1, 16, 3 * ratio - 1, 4 * ratio + 1)
        assert up(torch.randn(1, 16, 3, 4), lateral).shape == lateral.shape


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="'sorcery' is none of nearest"):
        build_for_decoder("sorcery", 8, 8)
    with pytest.raises(UsageError, match="heads"):
        build_for_decoder("sapa", 8, 8, heads=2)
    with pytest.raises(UsageError, match="unusable"):
        build_for_decoder("nearest", 8, 8, heads=2)
    with pytest.raises(UsageError, match="1 or more"):
        build_for_decoder("sapa", 8, 8, 0)


@pytest.mark.parametrize("module", ["segformer_head", "upernet_head"])
@pytest.mark.parametrize("name", ["resfu", "carafe"])
def test_heads_at_odd_sizes(example, module, name):
    model = example(module).Segmenter(name)
    assert model(torch.randn(2, 3, 65, 91)).shape == (2, 3, 65, 91)


def test_detectors_run_and_learn_at_odd_sizes(example):
    fpn = example("torchvision_fpn")
    target = {
        "boxes": torch.tensor([[10.0, 12.0, 50.0, 44.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.zeros(1, 67, 83, dtype=torch.uint8),
    }
    target["masks"][0, 12:44, 10:50] = 1
    for masks in (False, True):
        detector = fpn.build_detector("sapa", masks=masks).train()
        losses = detector([torch.rand(3, 67, 83)], [target])
        assert ("loss_mask" in losses) == masks
        sum(losses.values()).backward()
        ups = detector.backbone.fpn.up_blocks
        assert all(p.grad is not None for p in ups.parameters())
        found = detector.eval()([torch.rand(3, 67, 83)])[0]
        assert {"boxes", "scores"} <= set(found)


def test_nearest_in_the_pyramid_is_torchvisions_own(example):
    """And so a pretrained detector is the same one until its upsampler is another."""
    fpn = example("torchvision_fpn")
    own = fpn.FeaturePyramidNetwork([8, 16, 24], 12)
    ours = fpn.UpsamplingFPN([8, 16, 24], 12, "nearest")
    ours.load_state_dict(own.state_dict())
    sizes = zip((8, 16, 24), ((16, 24), (8, 12), (4, 6)), strict=True)
    x = {str(c): torch.randn(1, c, *size) for c, size in sizes}
    for name, level in own(x).items():
        torch.testing.assert_close(ours(x)[name], level)
    detector = fpn.build_detector("nearest")
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    fpn.use_upsampler(detector, "sapa")
    after = detector.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert any(k.startswith("backbone.fpn.up_blocks.0.query") for k in after)


@pytest.mark.parametrize("name", DECODER_UPSAMPLERS + decoders.ENCODER_UPSAMPLERS)
def test_matting_with_every_method_at_odd_sizes(example, name):
    model = example("matting").MattingNet(name)
    x = torch.randn(2, 4, 37, 51)
    x[:, 3] = x[:, 3].sign() * (x[:, 3].abs() > 1)
    alpha = model(x)
    assert alpha.shape == (2, 1, 37, 51)
    assert (alpha[x[:, 3:] == 1] == 1).all() and (alpha[x[:, 3:] == -1] == 0).all()
    alpha.sum().backward()


# How far below nearest's error at edges each must be after so few steps.
LEARNED = [
    ("segformer_head", "sapa", "at edges", 40, 0.9),
    ("upernet_head", "sapa", "at edges", 40, 0.95),
    ("depth", "resfu", "at edges", 40, 0.95),
    ("torchvision_fpn", "sapa", "at edges", 80, 0.98),
    ("matting", "resfu", "gradient", 40, 0.95),
]


@pytest.mark.parametrize(("module", "name", "measure", "steps", "share"), LEARNED)
def test_better_edges_than_nearest(example, module, name, measure, steps, share):
    compare = example(module).compare
    assert compare(name, steps)[measure] < share * compare("nearest", steps)[measure]
