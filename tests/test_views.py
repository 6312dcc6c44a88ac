"""Backbones with shifted views: exact geometry, one grid for all that stands behind it."""

from __future__ import annotations

import json
import pickle
from fractions import Fraction
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy import ToyBackbone

from fmupsample.backbones import Backbone, ViewedBackbone, load_backbone
from fmupsample.backbones import views as views_module
from fmupsample.backbones.views import axis_shifts, title, with_views
from fmupsample.errors import BackboneError, ShapeError, UsageError
from fmupsample.layers.parts import InParts
from fmupsample.upsamplers import Bilinear, JointBilateral
from fmupsample.windows import features_in_windows


class Means(nn.Module):
    """A "backbone" whose features are the mean colours of patches."""

    name, architecture, layer, channels = "means.v1", "means", 0, 3
    fixed_size, default_image_size = None, 64
    mean, std = (0.5,) * 3, (0.25,) * 3
    fingerprint = "0123456789ab"

    def __init__(self, *stride: int) -> None:
        super().__init__()
        self.stride = self.size_multiple = stride if len(stride) == 2 else stride * 2
        self.batches: list[int] = []

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // self.stride[0], size[1] // self.stride[1]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(images))
        return F.avg_pool2d(images, self.stride)


def coordinates(height: int, width: int) -> torch.Tensor:
    """An image ``[1, 3, H, W]`` whose colours are y, x and y + x of the pixels' centres."""
    y = torch.arange(height, dtype=torch.float64)[:, None].expand(height, width) + 0.5
    x = torch.arange(width, dtype=torch.float64).expand(height, width) + 0.5
    return torch.stack([y, x, y + x])[None]


@pytest.mark.parametrize("views", [2, 4, 9])
@pytest.mark.parametrize("stride", [(16, 16), (14, 14), (8, 8), (7, 7), (32, 32), (3, 5), (14, 8)])
def test_cells_are_centred_where_the_finer_grid_says(views, stride) -> None:
    """Features that are coordinates give those of the cells' centres, exactly, inside.

    At the border patches see repeated pixels, and the mean of those is not a centre.
    """
    backbone = with_views(Means(*stride), views)
    h, w, n = 6, 7, 3 if views == 9 else 2
    size = (h * stride[0], w * stride[1])
    found = backbone(coordinates(*size))[0]
    assert backbone.grid(size) == (h * n, w * n) == tuple(found.shape[1:])
    y, x = (
        (torch.arange(cells * n, dtype=torch.float64) + 0.5) * side / n
        for cells, side in zip((h, w), stride, strict=True)
    )
    inside = (slice(2 * n, -2 * n),) * 2
    expected = torch.stack([y[:, None].expand(h * n, w * n), x.expand(h * n, w * n)])
    torch.testing.assert_close(found[:2][:, *inside], expected[:, *inside], rtol=0, atol=1e-9)
    torch.testing.assert_close(found[2], found[0] + found[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("views", [2, 4, 9])
def test_borders_are_exact_where_the_image_goes_on(views) -> None:
    """With its surroundings shown, all cells are centred exactly, also moved ones at the ends.

    Of two views the two corners between the views are the mean of what touches them.
    """
    backbone = with_views(Means(14), views)
    (down, across), (h, w) = backbone.reach, backbone.grid((56, 70))
    image = coordinates(56 + 2 * down, 70 + 2 * across)
    found = backbone(image, surrounded=True)[0]
    expected = (torch.arange(w, dtype=torch.float64) + 0.5) * 70 / w + across
    error = (found[1] - expected).abs()
    if views == 2:
        corners = error[0, -1], error[-1, 0]
        assert all(float(c) == pytest.approx(3.5) for c in corners)
        error[0, -1] = error[-1, 0] = 0
    assert float(error.max()) < 1e-9
    assert (h, w) == ((12, 15) if views == 9 else (8, 10))


def test_views_see_what_they_should_with_the_border_repeated() -> None:
    """Four views of 16 pixels: every cell is the mean of a patch around its centre."""
    image = torch.rand(2, 3, 48, 32, dtype=torch.float64)
    found = with_views(Means(16), 4)(image)
    padded = F.pad(image, (4,) * 4, mode="replicate")
    for i, j in product(range(6), range(4)):
        top, left = 8 * i, 8 * j  # the patch begins 4 pixels before the cell
        patch = padded[:, :, top : top + 16, left : left + 16]
        torch.testing.assert_close(found[:, :, i, j], patch.mean((2, 3)))


def test_two_views_are_a_quincunx_and_means_of_neighbours() -> None:
    image = torch.rand(1, 3, 48, 48, dtype=torch.float64)
    two, four = (with_views(Means(16), n)(image)[0] for n in (2, 4))
    torch.testing.assert_close(two[:, ::2, ::2], four[:, ::2, ::2])
    torch.testing.assert_close(two[:, 1::2, 1::2], four[:, 1::2, 1::2])
    for i, j in ((i, j) for i, j in product(range(6), repeat=2) if (i + j) % 2):
        across = [j_ for j_ in (j - 1, j + 1) if 0 <= j_ < 6]
        down = [i_ for i_ in (i - 1, i + 1) if 0 <= i_ < 6]
        pairs = [[two[:, i, j_] for j_ in across], [two[:, i_, j] for i_ in down]]
        whole = [pair for pair in pairs if len(pair) == 2] or pairs
        expected = torch.stack([cell for pair in whole for cell in pair]).mean(0)
        torch.testing.assert_close(two[:, i, j], expected)


@pytest.mark.parametrize("views", [2, 4, 9])
def test_one_cell_is_enough(views) -> None:
    found = with_views(Means(14), views)(torch.full((1, 3, 14, 14), 0.7))
    torch.testing.assert_close(found, torch.full_like(found, 0.7))


def test_shifts_are_whole_and_their_remainders_known() -> None:
    assert axis_shifts(16, 2) == ((-4, 4), (0, 0))
    assert axis_shifts(14, 2) == ((-4, 3), (Fraction(1, 2),) * 2)
    assert axis_shifts(14, 3) == ((-5, 0, 5), (Fraction(1, 3), 0, Fraction(-1, 3)))
    for stride, count in product(range(3, 40), (2, 3)):
        whole, rest = axis_shifts(stride, count)
        exact = [Fraction((2 * a + 1 - count) * stride, 2 * count) for a in range(count)]
        assert [w + r for w, r in zip(whole, rest, strict=True)] == exact
        assert max(map(abs, rest)) <= Fraction(1, 2)
        assert sorted({*whole, whole[0] + stride}) == [*whole, whole[0] + stride]


def test_a_backbone_with_views_is_a_backbone(tiny_backbone) -> None:
    viewed = with_views(tiny_backbone, 4)
    assert isinstance(viewed, Backbone) and isinstance(viewed, ViewedBackbone)
    assert with_views(tiny_backbone, 1) is tiny_backbone and tiny_backbone.views == 1
    for name in ("name", "architecture", "layer", "channels", "mean", "std", "size_multiple"):
        assert getattr(viewed, name) == getattr(tiny_backbone, name)
    assert viewed.stride == (8, 8) and viewed.views == 4 and viewed.model is tiny_backbone.model
    assert viewed.fingerprint != tiny_backbone.fingerprint
    assert viewed.fingerprint != with_views(tiny_backbone, 9).fingerprint
    assert title(viewed) == "test_vit.random, 4 views" and "views=4" in repr(viewed)
    assert viewed.train().training is False
    image = torch.randn(2, 3, 64, 96)
    found = viewed(image)
    assert found.shape == (2, 64, 8, 12)
    padded = F.pad(image, (4,) * 4, mode="replicate")
    for a, b in product((0, 1), repeat=2):
        own = tiny_backbone(padded[:, :, 8 * a : 8 * a + 64, 8 * b : 8 * b + 96])
        torch.testing.assert_close(found[:, :, a::2, b::2], own, rtol=1e-4, atol=1e-5)
    with pytest.raises(ShapeError, match="multiples of 16x16"):
        viewed(torch.randn(1, 3, 60, 96))
    assert with_views(ToyBackbone(stride=7), 9).stride == (7 / 3, 7 / 3)
    json.dumps(list(with_views(ToyBackbone(stride=7), 9).stride))
    again = pickle.loads(pickle.dumps(with_views(Means(14), 4)))  # as it goes to other machines
    part = torch.rand(1, 3, 28, 42)
    assert torch.equal(again(part), with_views(Means(14), 4)(part))


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet"])
def test_convolutional_nets_and_half_precision(name) -> None:
    backbone = load_backbone(name, pretrained=False, views=9)
    with torch.autocast("cpu", torch.bfloat16):
        found = backbone(torch.randn(1, 3, 64, 96))
    assert found.dtype == torch.float32
    assert tuple(found.shape[2:]) == backbone.grid((64, 96)) == (12, 18)


def test_a_model_of_one_size() -> None:
    backbone = load_backbone(
        "vit_relpos_small_patch16_224", pretrained=False, image_size=(64, 96), views=4
    )
    assert backbone.fixed_size == (64, 96)
    found = backbone(torch.zeros(1, 3, 64, 96))
    assert tuple(found.shape[2:]) == backbone.grid((64, 96)) == (8, 12)


def test_many_pixels_go_in_turn_with_the_same_result(monkeypatch) -> None:
    image = torch.rand(2, 3, 28, 28, dtype=torch.float64)
    single = Means(14)
    whole = with_views(single, 9)(image)
    assert single.batches == [18]
    monkeypatch.setattr(views_module, "_PIXELS_AT_ONCE", 4 * 2 * 28 * 28)
    single.batches.clear()
    assert torch.equal(with_views(single, 9)(image), whole)
    assert single.batches == [8, 8, 2]
    monkeypatch.setattr(views_module, "_PIXELS_AT_ONCE", 1)
    assert torch.equal(with_views(single, 9)(image), whole)


def test_what_cannot_be() -> None:
    with pytest.raises(UsageError, match="3 views are not possible: use 1, 2, 4, 9"):
        load_backbone("embedded", views=3)
    with pytest.raises(BackboneError, match="2x2 pixels a cell: too few for 9 views"):
        with_views(Means(2), 9)


@pytest.mark.parametrize("upsampler", [Bilinear(), JointBilateral()], ids=lambda u: u.name)
@pytest.mark.parametrize("views", [2, 4, 9])
def test_any_upsampler_at_any_ratio(upsampler, views) -> None:
    """Value first, and at ratios that are not whole."""
    backbone = with_views(Means(14), views)
    image = torch.rand(1, 3, 56, 70)
    x = backbone(image)
    for size in ((56, 70), (61, 83)):
        full = upsampler(x, image, size=size)
        weights = upsampler.kernels(x, image, size)
        matrix = torch.randn(2, 3)
        first = upsampler.reassemble(weights, torch.einsum("nc,bchw->bnhw", matrix, x))
        torch.testing.assert_close(
            first, torch.einsum("nc,bchw->bnhw", matrix, full), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(("views", "stride"), [(4, 16), (4, 8), (9, 12), (9, 15)])
def test_windows_of_a_local_backbone_are_the_whole(views, stride) -> None:
    """Windows show the views what is around them, so that nothing is repeated inside an image."""
    backbone = with_views(Means(stride), views)
    image = torch.rand(3, 12 * stride, 9 * stride)
    whole = backbone(image[None])[0]

    def run(parts: torch.Tensor) -> torch.Tensor:
        return backbone(parts, surrounded=True)

    for shown in (image, InParts(image, lambda part: part)):
        window = (6 * stride, 5 * stride)
        found = features_in_windows(run, shown, window, (stride, stride), 2, backbone.reach)
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("views", [2, 4, 9])
def test_windows_whose_cells_are_no_whole_pixels(views) -> None:
    """What is moved, or filled, at the end of a window differs there a little from the whole."""
    backbone = with_views(Means(14), views)
    image = F.avg_pool2d(torch.rand(1, 3, 180, 138), 13, 1)[0]
    whole = backbone(image[None])[0]

    def run(parts: torch.Tensor) -> torch.Tensor:
        return backbone(parts, surrounded=True)

    found = features_in_windows(run, image, (84, 70), (14, 14), 2, backbone.reach)
    assert found.shape == whole.shape == (3, *backbone.grid((168, 126)))
    assert (found - whole).abs().max() < 0.2 * (whole.amax() - whole.amin())
    assert (found - whole).abs().mean() < 0.01 * (whole.amax() - whole.amin())
