"""ReSFU for any backbone: what its keys depend on, how it is trained, saved and used."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_training import HEAD, assert_same, draw_pictures, options, run
from toy import ToyBackbone

from fmupsample.errors import HeadError, UsageError
from fmupsample.training import loop
from fmupsample.upsamplers import load_head, load_upsampler
from fmupsample.upsamplers.heads import ANY, read_head_metadata
from fmupsample.upsamplers.learned import recommended
from fmupsample.upsamplers.normalisation import MEAN, STD
from fmupsample.upsamplers.registry import METHODS
from fmupsample.upsamplers.resfu.module import UNIVERSAL
from fmupsample.upsamplers.resfu.projection import Projection, project, random_projection

_SMALL = {name: value for name, value in HEAD.items() if name != "neighbours"}


def universal(seed: int = 0, **changes) -> torch.nn.Module:
    """A small one with scores that say something."""
    torch.manual_seed(seed)
    config = {"channels": 0, **recommended(UNIVERSAL, {}), **_SMALL, **changes}
    head = METHODS[UNIVERSAL].build(config)
    for pair in (head.semantic_scores, head.detail_scores):
        torch.nn.init.uniform_(pair.weight, 0.1, 0.5)
    return head.double().eval().requires_grad_(False)


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# --- keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [3, 32, 192])
def test_projections_are_orthogonal(channels):
    p = random_projection(channels, 32, 5)
    assert p.shape == (32, channels)
    small = p @ p.T if channels >= 32 else p.T @ p
    torch.testing.assert_close(small, torch.eye(len(small), dtype=p.dtype))
    assert not torch.equal(p, random_projection(channels, 32, 6))


def test_the_projection_of_a_seed_never_changes():
    # Heads are trained with any projection but used with this one: files must mean the same.
    expected = [[0.6417, 0.3560, 0.6793], [0.0611, 0.8592, -0.5080]]
    torch.testing.assert_close(
        random_projection(3, 2, 0), torch.tensor(expected, dtype=torch.float64), atol=1e-4, rtol=0
    )


def test_distances_are_kept_on_average():
    x = normal(1, 384, 6, 5)
    tokens = project(x, torch.eye(384, dtype=x.dtype)).flatten(2)[0].T
    true = torch.cdist(tokens, tokens).square()
    found = []
    for seed in range(40):
        keys = project(x, random_projection(384, 32, seed)).flatten(2)[0].T
        found.append(torch.cdist(keys, keys).square() * 384 / 32)
    off = ~torch.eye(30, dtype=torch.bool)
    ratio = torch.stack(found).mean(0)[off] / true[off]
    assert ratio.min() > 0.85 and ratio.max() < 1.15 and abs(ratio.mean() - 1) < 0.01


def test_scale_and_shift_of_channels_do_not_matter():
    head, x, image = universal(), normal(2, 24, 5, 6), normal(2, 3, 35, 44, seed=2)
    gain, mean = 10 ** (2 * normal(24, 1, 1, seed=3)), 10 * normal(24, 1, 1, seed=4)
    weights = head.kernels(x, image)
    torch.testing.assert_close(head.kernels(gain * (x + mean), image), weights, rtol=0, atol=1e-5)
    other = head.kernels(normal(2, 24, 5, 6, seed=9), image)
    assert (other - weights).abs().max() > 0.05  # the features do matter


def test_training_draws_a_new_projection_every_time():
    key, x = Projection(0, 8), normal(1, 16, 4, 4)
    assert not list(key.parameters())
    torch.manual_seed(3)
    first, second = key(x), key(x)
    assert (first - second).abs().max() > 0.1
    torch.manual_seed(3)
    assert torch.equal(key(x), first)
    key.eval()
    assert torch.equal(key(x), key(x))
    assert torch.equal(key(x), project(x, random_projection(16, 8, 0)))


@settings(max_examples=30, deadline=None)
@given(
    channels=st.integers(1, 40), height=st.integers(1, 5), width=st.integers(1, 5),
    scale=st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 1e6, 1e15]), seed=st.integers(0, 99),
)  # fmt: skip
def test_outputs_lie_between_their_neighbours(channels, height, width, scale, seed):
    """Whatever the features are: a mean of cells with weights that sum to 1."""
    head = universal(seed)
    x = scale * normal(1, channels, height, width, seed=seed)
    x[:, : channels // 2] += 3 * scale  # some far from 0
    image = normal(1, 3, 4 * height, 3 * width, seed=seed + 1)
    weights = head.kernels(x, image)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))
    y = head.reassemble(weights, x)
    largest = torch.nn.functional.max_pool2d(x, 3, 1, 1)
    smallest = -torch.nn.functional.max_pool2d(-x, 3, 1, 1)
    rows = torch.arange(4 * height) // 4
    columns = torch.arange(3 * width) // 3
    slack = 1e-9 * scale + 1e-300
    assert (y <= largest[:, :, rows][..., columns] + slack).all()
    assert (y >= smallest[:, :, rows][..., columns] - slack).all()


def test_windows_are_parts_of_the_whole():
    head, x, image = universal(), normal(1, 20, 32, 30), normal(1, 3, 450, 431, seed=2)
    whole = head.kernels(x, image)
    parts = list(head.kernels_in_rows(x, image, (450, 431), 60_000))
    assert len(parts) > 1
    torch.testing.assert_close(torch.cat(parts, 2), whole)


def test_pictures_normalised_in_any_way_are_the_same_picture():
    head, x, pixels = universal(), normal(1, 20, 4, 5), normal(1, 3, 40, 41, seed=2).sigmoid()

    def seen(mean, std) -> torch.Tensor:
        head.use_with(mean, std)
        mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (mean, std))
        return head.kernels(x, (pixels - mean) / std)

    expected = seen(MEAN, STD)
    for mean, std in [((0.5,) * 3, (0.5,) * 3), ((0.0,) * 3, (1.0,) * 3)]:
        torch.testing.assert_close(seen(mean, std), expected)


def test_specialised_it_starts_as_it_was():
    head, x, image = universal(), normal(1, 20, 5, 4), normal(1, 3, 35, 28, seed=2)
    own = head.float().specialised(20).double().eval()
    assert own.name == "resfu" and own.config.channels == 20
    assert own.key.weight.shape == (8, 20) and own.key.weight.requires_grad
    torch.testing.assert_close(
        own.kernels(x, image), head.double().kernels(x, image), rtol=1e-4, atol=1e-5
    )


def test_what_it_cannot_be():
    with pytest.raises(UsageError, match="channels must be 0"):
        METHODS[UNIVERSAL].build({"channels": 16})
    with pytest.raises(UsageError, match="keys='projected'"):
        METHODS["resfu"].build({"channels": 0})


# --- training -------------------------------------------------------------------------------------


def backbones() -> list[ToyBackbone]:
    return [ToyBackbone(channels=16), ToyBackbone(channels=24, stride=4, name="other.v1")]


def wanted(**changes):
    return options(**{
        "upsampler": UNIVERSAL, "upsampler_config": _SMALL, "objective": {"clusters": 1.0},
        "clusters": 8, "enlarge": 2, **changes,
    })  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return draw_pictures(tmp_path_factory.mktemp("universal") / "pictures")


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    path = tmp_path_factory.mktemp("universal") / "universal.safetensors"
    report = run(pictures, path, wanted(steps=6, validate_every=3), backbone=backbones())
    assert report.config.upsampler == UNIVERSAL and report.score is not None
    return path


def test_it_is_trained_on_several_and_serves_another(trained):
    metadata = read_head_metadata(trained)
    assert metadata["backbone"] == {"name": ANY} and metadata["upsampler"] == UNIVERSAL
    assert metadata["card"]["backbones"] == ["toy.v1, layer 11", "other.v1, layer 11"]
    third = ToyBackbone(channels=11, stride=16, name="third.v1")
    head = load_head(trained, third)
    assert head(torch.randn(1, 11, 2, 3), torch.randn(1, 3, 32, 48)).shape == (1, 11, 32, 48)
    for name in ("curve.png", "previews/step-000003-1.png"):
        assert (trained.with_name("universal.safetensors.train") / name).is_file()


def test_a_run_on_several_goes_on_to_the_same_head(pictures, trained, tmp_path, monkeypatch):
    output, step = tmp_path / "again.safetensors", loop.Trainer._do_step

    def fail(self, *arguments) -> None:
        if self.step == 4:
            raise RuntimeError("the power is out")
        step(self, *arguments)

    config = wanted(steps=6, validate_every=3)
    monkeypatch.setattr(loop.Trainer, "_do_step", fail)
    with pytest.raises(RuntimeError, match="power"):
        run(pictures, output, config, backbone=backbones())
    monkeypatch.setattr(loop.Trainer, "_do_step", step)
    with pytest.raises(UsageError, match="other pictures, backbone"):
        run(pictures, output, config, backbone=backbones()[::-1], resume=True)
    assert run(pictures, output, config, backbone=backbones(), resume=True).resumed_at == 3
    assert_same(output, trained)


def test_it_is_specialised(pictures, trained, tmp_path):
    output, third = tmp_path / "own.safetensors", ToyBackbone(channels=12, name="third.v1")
    config = options(steps=4, upsampler_config={}, lr=1e-2)
    run(pictures, output, config, backbone=third, start_from=trained)
    head = load_head(output, third)
    assert head.name == "resfu" and head.config.keys == "projected"
    start = random_projection(12, 8, 0).float()
    assert (head.key.weight - start).abs().max() > 1e-3  # and the projection is trained too
    with pytest.raises(HeadError, match="another backbone"):
        load_head(output, ToyBackbone(channels=16))


def test_what_several_backbones_cannot_do(pictures, trained, tmp_path):
    output = tmp_path / "head.safetensors"
    with pytest.raises(
        UsageError, match="several backbones are for --upsampler affinity, anyup or resfu-universal"
    ):
        run(pictures, output, options(), backbone=backbones())
    with pytest.raises(UsageError, match="holds a resfu-universal, which cannot become a sapa"):
        run(pictures, output, options(upsampler="sapa", upsampler_config={}), start_from=trained)
    with pytest.raises(UsageError, match="--objective task is for a head of one backbone"):
        run(pictures, output, wanted(objective={"task": 1.0}), backbone=backbones())


# --- use ------------------------------------------------------------------------------------------


def test_it_serves_where_there_is_no_other(trained, tmp_path, monkeypatch):
    stranger = ToyBackbone(channels=13, name="stranger.v1")
    heads = tmp_path / "heads"
    heads.mkdir()
    monkeypatch.setattr("fmupsample.upsamplers.loading.head_folders", lambda: [heads])
    with pytest.raises(HeadError, match="no head for stranger"):
        load_upsampler(stranger)
    (heads / "universal.safetensors").write_bytes(trained.read_bytes())
    assert load_upsampler(stranger).name == UNIVERSAL
    assert load_upsampler(stranger, UNIVERSAL).name == UNIVERSAL
    with pytest.raises(HeadError, match="no head for stranger"):
        load_upsampler(stranger, "resfu")  # by that name one of its own was asked for
