"""The frozen backbone: what it returns must equal timm's own features, cell for cell."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from fmupsample.backbones import Backbone, load_backbone
from fmupsample.errors import BackboneError, ShapeError

# One tiny architecture for each kind of model: name, stride and channels of the default layer.
SMALL = {
    "test_vit": (16, 64),  # class token
    "test_vit2": (16, 64),  # registers
    "vit_pe_spatial_tiny_patch16_512": (16, 192),  # EVA class, rotary positions
    "test_efficientnet": (16, 48),
    "test_byobnet": (16, 128),
    "test_convnext": (16, 48),
}


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        yield


def patch_map(backbone: Backbone, images: torch.Tensor) -> torch.Tensor:
    """The last layer's map by timm's plain ``forward_features``."""
    tokens = backbone.model.forward_features(images)
    if tokens.ndim == 4:
        return tokens
    tokens = tokens[:, backbone.model.num_prefix_tokens :]
    h, w = images.shape[-2] // 16, images.shape[-1] // 16
    return tokens.reshape(len(images), h, w, -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", SMALL)
def test_default_layer_of_each_kind(name):
    backbone = load_backbone(name, pretrained=False)
    stride, channels = SMALL[name]
    assert (backbone.stride, backbone.channels) == ((stride, stride), channels)
    assert backbone.fixed_size is None
    assert backbone.name == f"{name}.random"
    images = torch.randn(2, 3, 48, 80)
    features = backbone(images)
    assert features.shape == (2, channels, 3, 5)
    assert backbone.grid((48, 80)) == (3, 5)
    assert not features.requires_grad


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3", "test_convnext"])
def test_last_layer_equals_forward_features(name):
    backbone = load_backbone(name, layer=-1, pretrained=False)
    side = 32 if name == "test_convnext" else 16
    images = torch.randn(2, 3, 3 * side, 5 * side)
    torch.testing.assert_close(backbone(images), patch_map(backbone, images))


def test_inner_layer_is_that_block_normed(tiny_backbone):
    backbone = load_backbone("test_vit", layer=2, pretrained=False)
    images = torch.randn(1, 3, 32, 48)
    model, caught = backbone.model, []
    handle = model.blocks[2].register_forward_hook(lambda m, i, o: caught.append(o))
    model.forward_features(images)
    handle.remove()
    expected = model.norm(caught[0])[:, model.num_prefix_tokens :].reshape(1, 2, 3, -1)
    torch.testing.assert_close(backbone(images), expected.permute(0, 3, 1, 2))
    assert backbone.layer == 2


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_byobnet"])
@pytest.mark.parametrize("cell", [(1, 4), (4, 1)])
def test_a_change_in_the_picture_moves_that_cell_most(name, cell):
    backbone = load_backbone(name, pretrained=False)
    before = torch.randn(1, 3, 96, 112)
    after = before.clone()
    y, x = cell
    after[:, :, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16] += 3 * torch.randn(1, 3, 16, 16)
    moved = (backbone(after) - backbone(before)).norm(dim=1)[0]
    assert divmod(int(moved.argmax()), 7) == cell


def test_levels_by_index_and_by_stride():
    by_stride = load_backbone("test_convnext", layer="s8", pretrained=False)
    by_index = load_backbone("test_convnext", layer="1", pretrained=False)
    from_end = load_backbone("test_convnext", layer=-3, pretrained=False)
    assert by_stride.layer == by_index.layer == from_end.layer == 1
    assert by_stride.stride == (8, 8)
    assert by_stride(torch.randn(1, 3, 40, 24)).shape[-2:] == (5, 3)


@pytest.mark.parametrize("layer", [6, -7, "s8", "middle", ""])
def test_a_wrong_layer_lists_what_is_possible(layer):
    with pytest.raises(BackboneError, match=r"test_vit has no layer .*0 to 5 .*-1 to -6"):
        load_backbone("test_vit", layer=layer, pretrained=False)


def test_a_wrong_level_lists_strides_and_channels():
    with pytest.raises(BackboneError, match=r"2 \(stride 16, 48 channels\)"):
        load_backbone("test_convnext", layer="s64", pretrained=False)


def test_frozen_and_always_in_eval(tiny_backbone):
    tiny_backbone.train()
    assert not any(module.training for module in tiny_backbone.modules())
    assert not any(p.requires_grad for p in tiny_backbone.parameters())


def test_facts_come_from_the_model():
    backbone = load_backbone("vit_tiny_patch16_224.augreg_in21k", pretrained=False)
    assert backbone.mean == backbone.std == (0.5, 0.5, 0.5)
    assert backbone.prefix_tokens == 1
    assert backbone.default_image_size == 448
    assert backbone.size_multiple == (16, 16)
    assert backbone.architecture == "vit_tiny_patch16_224"


def test_one_size_models_say_their_size_and_can_be_built_for_another():
    backbone = load_backbone("vit_relpos_small_patch16_224", pretrained=False)
    assert backbone.fixed_size == (224, 224)
    assert backbone.default_image_size == 224
    with pytest.raises(ShapeError, match="accepts only 224x224 pixels, got 224x240"):
        backbone(torch.zeros(1, 3, 224, 240))
    other = load_backbone("vit_relpos_small_patch16_224", pretrained=False, image_size=(64, 96))
    assert other.fixed_size == (64, 96)
    assert other(torch.zeros(1, 3, 64, 96)).shape == (1, 384, 4, 6)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 32, 32), r"\[B, 3, H, W\]"),
        (torch.zeros(1, 1, 32, 32), r"\[1, 1, 32, 32\]"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "uint8"),
        (torch.zeros(1, 3, 32, 40), "multiples of 16x16 pixels, got 32x40"),
    ],
)
def test_wrong_pictures_are_refused(tiny_backbone, images, message):
    with pytest.raises(ShapeError, match=message):
        tiny_backbone(images)


def test_fingerprint_follows_the_weights():
    first = load_backbone("test_vit", pretrained=False)
    torch.manual_seed(7)
    first, same = (load_backbone("test_vit", pretrained=False) for _ in range(2))
    assert len(first.fingerprint) == 12
    assert first.fingerprint != same.fingerprint
    same.model.load_state_dict(first.model.state_dict())
    from fmupsample.fingerprint import fingerprint

    assert fingerprint(same.model.state_dict()) == first.fingerprint
    with torch.no_grad():
        same.model.norm.bias[0] += 1e-6
    assert fingerprint(same.model.state_dict()) != first.fingerprint


class _Old(nn.Module):
    """A model as older timm versions have them: feature_info, but no forward_intermediates."""

    feature_info = (
        {"num_chs": 4, "reduction": 2, "module": "stem"},
        {"num_chs": 8, "reduction": 4, "module": "stage"},
    )

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.stage = nn.Conv2d(4, 8, 3, 2, 1)

    def forward_features(self, x):
        return self.stage(self.stem(x))


def test_models_without_forward_intermediates_are_read_with_a_hook():
    model, facts = _Old(), {"mean": (0, 0, 0), "std": (1, 1, 1), "native_size": (32, 32)}
    backbone = Backbone(model, name="old", architecture="old", layer=0, **facts)
    images = torch.randn(1, 3, 12, 20)
    torch.testing.assert_close(backbone(images), model.stem(images))
    assert not model.stem._forward_hooks


def test_a_net_without_a_regular_grid_is_refused():
    class Valid(_Old):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3, 2)

    with pytest.raises(BackboneError, match="no regular feature grid at layer 0"):
        Backbone(
            Valid(), name="v", architecture="v", layer=0,
            mean=(0, 0, 0), std=(1, 1, 1), native_size=(32, 32),
        )  # fmt: skip


def test_timm_still_has_what_the_wrapper_asks_for():
    model = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True)
    assert model.feature_info[0].keys() >= {"num_chs", "reduction"}
    assert model.pretrained_cfg.keys() >= {"mean", "std", "input_size", "architecture"}
