"""Training-free upsamplers, head files, and the way from a name to an upsampler."""

from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fmupsample.errors import HeadError, ShapeError, UsageError
from fmupsample.upsamplers import (
    CARAFE,
    Bicubic,
    Bilinear,
    CARAFEConfig,
    GuidedFilter,
    JointBilateral,
    Nearest,
    ReSFU,
    ReSFUConfig,
    load_head,
    load_upsampler,
    save_head,
)
from fmupsample.upsamplers.heads import read_head_metadata
from fmupsample.upsamplers.loading import find_head


def backbone(**changes):
    facts = {
        "name": "toy.v1",
        "layer": -1,
        "channels": 6,
        "stride": (8, 8),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "fingerprint": "0" * 12,
    }
    return SimpleNamespace(**(facts | changes))


def head():
    torch.manual_seed(0)
    config = ReSFUConfig(channels=6, embedding=8, middle=16, groups=2, norm_groups=4)
    return ReSFU(config).eval()


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FMUPSAMPLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("method", [Nearest(), Bilinear(), JointBilateral()])
@pytest.mark.parametrize("size", [(12, 20), (13, 22), (3, 5), (50, 6)])
def test_weights_sum_to_one_and_constants_stay(method, size):
    x = torch.full((2, 4, 3, 5), 2.5)
    image = torch.rand(2, 3, *size)
    weights = method.kernels(x, image)
    assert weights.shape[0] == 2
    assert weights.shape[2:] == size
    torch.testing.assert_close(weights.sum(1), torch.ones(2, *size))
    torch.testing.assert_close(method(x, image), torch.full((2, 4, *size), 2.5))


def test_nearest_and_bilinear_are_those_of_torch():
    x = torch.randn(1, 3, 5, 4)
    interpolate = torch.nn.functional.interpolate
    for size in [(15, 12), (17, 23)]:
        expected = interpolate(x, size=size, mode="nearest-exact")
        torch.testing.assert_close(Nearest()(x, size=size), expected)
        expected = interpolate(x, size=size, mode="bilinear", align_corners=False)
        torch.testing.assert_close(Bilinear()(x, size=size), expected)


def test_jbu_follows_the_edge_of_the_picture():
    # A step in the picture in the middle of a cell; the features differ left and right of it.
    x = torch.tensor([0.0, 0.0, 0.6, 1.0, 1.0]).expand(1, 1, 5, 5).contiguous()
    image = torch.zeros(1, 3, 40, 40)
    image[..., 19:] = 3.0  # normalised units; pixel 19 lies inside cell 2
    sharp = JointBilateral()(x, image)[0, 0, 20]
    smooth = Bilinear()(x, image)[0, 0, 20]
    assert (sharp[19] - sharp[18]) > 3 * (smooth[19] - smooth[18])


def test_jbu_on_a_flat_picture_is_smooth():
    x = torch.randn(1, 2, 6, 6)
    out = JointBilateral()(x, torch.zeros(1, 3, 48, 48))
    assert (out[..., 1:] - out[..., :-1]).abs().max() < 0.6


def test_jbu_refuses_nonsense():
    for wrong in ({"kernel_size": 4}, {"sigma_space": 0}, {"sigma_range": -1}):
        with pytest.raises(UsageError):
            JointBilateral(**wrong)
    with pytest.raises(ShapeError, match="needs a guidance"):
        JointBilateral()(torch.zeros(1, 2, 3, 3), size=(6, 6))


def test_a_head_file_round_trip(tmp_path):
    up, path = head(), tmp_path / "toy.safetensors"
    save_head(path, up, backbone(), {"steps": 3})
    again = load_head(path, backbone())
    x, image = torch.randn(1, 6, 3, 4), torch.randn(1, 3, 24, 32)
    torch.testing.assert_close(again(x, image), up(x, image), atol=0, rtol=0)
    assert not any(p.requires_grad for p in again.parameters())
    assert len(again.fingerprint) == 12
    assert read_head_metadata(path)["card"] == {"steps": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["toy.safetensors"]  # no temporary file left


@pytest.mark.parametrize(
    "up",
    [
        Nearest(), Bilinear(), Bicubic(), JointBilateral(3, 0.5, 0.25), GuidedFilter(2, 0.5),
    ],
    ids=lambda up: up.name,
)  # fmt: skip
def test_every_upsampler_has_head_files(tmp_path, up):
    """Those that are trained are saved in test_family.py."""
    path = tmp_path / "h.safetensors"
    save_head(path, up, backbone() if up.guidance_is_image else None)
    again = load_upsampler(backbone(), path)
    assert type(again) is type(up) and again.options() == up.options()
    assert again.fingerprint == (up.name if not up.state_dict() else again.fingerprint)
    x, image = torch.randn(1, 6, 3, 4), torch.randn(1, 3, 6, 8)
    torch.testing.assert_close(again(x, image), up.eval()(x, image), atol=0, rtol=0)


def test_what_head_files_cannot_hold_is_refused(tmp_path):
    path = tmp_path / "h.safetensors"
    with pytest.raises(UsageError, match=r"CARAFE is no upsampler.* the stack"):
        save_head(path, CARAFE(CARAFEConfig(channels=6)))
    for name, config in (
        ("jbu", '{"sigma_range": NaN}'), ("jbu", '{"kernel_size": "5"}'), ("jbu", '{"size": 5}'),
        ("jbu", '{"kernel_size": 4}'), ("guided", '{"radius": true}'),
        ("sapa", '{"channels": 0.5}'),
    ):  # fmt: skip
        save_head(path, JointBilateral())
        _rewrite(path, upsampler=name, config=config)
        with pytest.raises(HeadError, match="is unusable"):
            load_head(path)
    _rewrite(path, upsampler="a2u", config="{}")
    with pytest.raises(UsageError, match=r"a2u is a part .* examples/decoders"):
        load_head(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "other.v1", "fingerprint": "1" * 12}, r"toy\.v1"),
        ({"layer": 3}, "layer"),
        ({"channels": 8}, "channels"),
        ({"stride": (16, 16)}, "stride"),
    ],
)
def test_a_head_of_another_backbone_is_refused(tmp_path, change, words):
    save_head(tmp_path / "a.safetensors", head(), backbone())
    with pytest.raises(HeadError, match=words):
        load_head(tmp_path / "a.safetensors", backbone(**change))


def test_a_head_of_an_earlier_embedded_backbone_is_refused(tmp_path, no_cache):
    (no_cache / "heads").mkdir(parents=True)
    old = {"name": "embedded.v1", "fingerprint": "1" * 12}
    new = backbone(name="embedded.v2", fingerprint="2" * 12)  # the shapes alone would fit
    path = no_cache / "heads" / "old.safetensors"
    save_head(path, head(), backbone(**old))
    with pytest.raises(HeadError, match=r"v1 is no longer shipped: use a head of emb.*v2"):
        load_head(path, new)
    assert find_head(new, "resfu") is None  # nor is it found


def test_a_local_copy_of_the_same_weights_is_the_same_backbone(tmp_path, no_cache):
    (no_cache / "heads").mkdir(parents=True)
    save_head(no_cache / "heads" / "toy.safetensors", head(), backbone())
    assert isinstance(load_upsampler(backbone(name="toy.local-0000")), ReSFU)


def _rewrite(path, *, state=None, **metadata):
    with safe_open(path, "pt") as file:
        old = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors = state(tensors) if state else tensors
    save_file(tensors, path, old | metadata)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: p.unlink(), "no head file"),
        (lambda p: p.write_bytes(p.read_bytes()[:200]), "not a readable safetensors"),
        (lambda p: p.write_bytes(b""), "not a readable safetensors"),
        (lambda p: p.write_text("hello, I am a text file"), "not a readable safetensors"),
        (lambda p: save_file({"a": torch.zeros(1)}, p), "not a head file"),
        (lambda p: _rewrite(p, config="{"), "damaged"),
        (lambda p: _rewrite(p, config='{"heads": 3}'), "heads"),
        (lambda p: _rewrite(p, upsampler="sorcery"), "sorcery"),
        (
            lambda p: _rewrite(p, state=lambda s: {k: v for k, v in s.items() if k != "key.bias"}),
            "key.bias",
        ),
        (lambda p: _rewrite(p, state=lambda s: s | {"key.bias": torch.zeros(3)}), "shape"),
        (lambda p: _rewrite(p, state=lambda s: s | {"key.bias": s["key.bias"] / 0}), "NaN"),
    ],
)
def test_damaged_head_files_are_named(tmp_path, damage, words):
    path = tmp_path / "h.safetensors"
    save_head(path, head(), backbone())
    damage(path)
    with pytest.raises(HeadError, match=words):
        load_head(path, backbone())


def test_loading_by_name_and_by_file(tmp_path, no_cache):
    assert isinstance(load_upsampler(backbone(), "jbu"), JointBilateral)
    assert load_upsampler(backbone(), "bilinear").fingerprint == "bilinear"
    save_head(tmp_path / "h.safetensors", head(), backbone())
    assert isinstance(load_upsampler(backbone(), tmp_path / "h.safetensors"), ReSFU)
    with pytest.raises(UsageError, match="neither an upsampler"):
        load_upsampler(backbone(), "bicubical")


def test_the_cached_head_of_a_backbone_is_found(no_cache):
    (no_cache / "heads").mkdir(parents=True)
    (no_cache / "heads" / "broken.safetensors").write_text("no")
    save_head(no_cache / "heads" / "toy.safetensors", head(), backbone())
    assert isinstance(load_upsampler(backbone()), ReSFU)
    assert isinstance(load_upsampler(backbone(), "resfu"), ReSFU)


def test_no_head_names_the_ways_on(no_cache):
    with pytest.raises(HeadError, match=r"toy\.v1.*--upsampler affinity.*jbu.*--head"):
        load_upsampler(backbone(), "resfu")
