"""Bilateral cells: what keys depend on; heads trained, saved and used; names of before."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from small_training import HEAD, assert_same, draw_pictures, options, run
from toy import ToyBackbone

from fmupsample.errors import HeadError, ProbeError, RenamedWarning, UsageError
from fmupsample.images import find_images
from fmupsample.jobs.extract import extract
from fmupsample.labels import ClassTable
from fmupsample.pipeline import Pipeline
from fmupsample.probing.linear import LinearProbe
from fmupsample.probing.probe import make_probe
from fmupsample.runs.job import Recipe
from fmupsample.training import loop
from fmupsample.upsamplers import JointBilateral, load_head, load_upsampler, save_head
from fmupsample.upsamplers.bilateral.projection import Projection, project, random_projection
from fmupsample.upsamplers.heads import ANY, FORMAT, describe_backbone, read_head_metadata
from fmupsample.upsamplers.normalisation import MEAN, STD
from fmupsample.upsamplers.registry import METHODS
from fmupsample_cli.main import main

NAME = "bilateral-cells"
_SMALL = {"embedding": 8, "norm_groups": 2, "guidance_channels": 4}


def universal(seed: int = 0, **changes) -> torch.nn.Module:
    """A small one with scores that say something."""
    torch.manual_seed(seed)
    head = METHODS[NAME].build({"channels": 0, **_SMALL, **changes})
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
    assert own.name == NAME and own.config.channels == 20
    assert own.key.weight.shape == (8, 20) and own.key.weight.requires_grad
    torch.testing.assert_close(
        own.kernels(x, image), head.double().kernels(x, image), rtol=1e-4, atol=1e-5
    )


def test_what_it_cannot_be():
    with pytest.raises(UsageError, match="channels=0, any number, is for keys='projected'"):
        METHODS[NAME].build({"channels": 0, "keys": "learned"})
    with pytest.raises(UsageError, match="sigma_range must be more than 0"):
        METHODS[NAME].build({"channels": 16, "sigma_range": 0})
    with pytest.raises(UsageError, match="channels must be 1 or more"):
        METHODS["resfu"].build({"channels": 0})


@pytest.mark.parametrize("size", [(31, 44), (28, 35)])
def test_a_new_head_is_joint_bilateral_upsampling(size):
    options = {"channels": 6, "taper": False, "sigma_space": 0.6, "sigma_range": 0.8}
    up = METHODS[NAME].build({**_SMALL, **options}).double()
    x, image = normal(2, 6, 4, 5), normal(2, 3, *size, seed=2)
    bilateral = JointBilateral(3, sigma_space=0.6, sigma_range=0.8)
    torch.testing.assert_close(up.kernels(x, image), bilateral.kernels(x, image))


@pytest.mark.parametrize("keys", ["learned", "projected"])
def test_gradients(keys):
    up = METHODS[NAME].build({**_SMALL, "channels": 6, "sigma_space": 0.7, "keys": keys}).double()
    for pair in (up.semantic_scores, up.detail_scores):  # at first nothing before them matters
        torch.nn.init.uniform_(pair.weight, 0.1, 0.5)
    x, image = normal(1, 6, 2, 3).requires_grad_(), normal(1, 3, 6, 9, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: up(a, b).square().mean(), (x, image), atol=1e-6)
    up(x, image).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in up.parameters())


# --- training -------------------------------------------------------------------------------------


def backbones() -> list[ToyBackbone]:
    return [ToyBackbone(channels=16), ToyBackbone(channels=24, stride=4, name="other.v1")]


def wanted(**changes):
    return options(**{
        "upsampler": NAME, "upsampler_config": _SMALL, "objective": {"clusters": 1.0},
        "clusters": 8, "enlarge": 2, **changes,
    })  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return draw_pictures(tmp_path_factory.mktemp("universal") / "pictures")


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    path = tmp_path_factory.mktemp("universal") / "universal.safetensors"
    report = run(pictures, path, wanted(steps=6, validate_every=3), backbone=backbones())
    assert report.config.upsampler == NAME and report.score is not None
    return path


def test_it_is_trained_on_several_and_serves_another(trained):
    metadata = read_head_metadata(trained)
    assert metadata["backbone"] == {"name": ANY} and metadata["upsampler"] == NAME
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
    config = options(steps=4, upsampler=NAME, upsampler_config={}, lr=1e-2)
    run(pictures, output, config, backbone=third, start_from=trained)
    head = load_head(output, third)
    assert head.name == NAME and head.config.keys == "projected"
    start = random_projection(12, 8, 0).float()
    assert (head.key.weight - start).abs().max() > 1e-3  # and the projection is trained too
    with pytest.raises(HeadError, match="another backbone"):
        load_head(output, ToyBackbone(channels=16))


def test_what_several_backbones_cannot_do(pictures, trained, tmp_path):
    output = tmp_path / "head.safetensors"
    with pytest.raises(
        UsageError,
        match="several backbones are for --upsampler affinity, anyup, naf or bilateral-cells",
    ):
        run(pictures, output, options(), backbone=backbones())
    with pytest.raises(UsageError, match="holds a bilateral-cells, which cannot become a sapa"):
        run(pictures, output, options(upsampler="sapa", upsampler_config={}), start_from=trained)


# --- use ------------------------------------------------------------------------------------------


def test_it_serves_where_there_is_no_other(trained, tmp_path, monkeypatch):
    stranger = ToyBackbone(channels=13, name="stranger.v1")
    heads = tmp_path / "heads"
    heads.mkdir()
    monkeypatch.setattr("fmupsample.upsamplers.loading.head_folders", lambda: [heads])
    with pytest.raises(HeadError, match="no head for stranger"):
        load_upsampler(stranger)
    (heads / "universal.safetensors").write_bytes(trained.read_bytes())
    assert load_upsampler(stranger).name == NAME
    assert load_upsampler(stranger, NAME).config.channels == 0
    own = METHODS[NAME].build({**_SMALL, "channels": 13})
    save_head(heads / "z.safetensors", own, stranger)
    assert load_upsampler(stranger, NAME).config.channels == 13  # its own comes first
    with pytest.raises(HeadError, match="no head for stranger"):
        load_upsampler(stranger, "resfu")  # by that name one of its own was asked for


# --- names of earlier versions --------------------------------------------------------------------

# As they were written: one class of many forms.
_OLD = {
    "guidance_channels": 4, "stem": True, "kernel_size": 3, "embedding": 8, "middle": 16,
    "groups": 2, "norm_groups": 2, "semantic": True, "detail": True, "align": True,
    "guided_radius": 8, "guided_eps": 1e-3,
}  # fmt: skip
_OLD_CELLS = {
    **_OLD, "similarity": "distance", "neighbours": "coarse", "taper": True, "sigma_space": None,
    "sigma_range": 0.6,
}  # fmt: skip
_OLD_PAPER = {
    **_OLD, "channels": 16, "keys": "learned", "similarity": "pcdc", "neighbours": "fine",
    "taper": False, "sigma_space": None, "sigma_range": None,
}  # fmt: skip


def old_file(path, name: str, config: dict, head, backbone: dict) -> None:
    metadata = {"format": FORMAT, "upsampler": name, "card": "{}"}
    metadata |= {"config": json.dumps(config), "backbone": json.dumps(backbone)}
    save_file(head.state_dict(), path, metadata)


def test_heads_of_earlier_versions_are_read(tmp_path):
    path = tmp_path / "old.safetensors"
    head = METHODS[NAME].build({**_SMALL, "channels": 0})
    config = {**_OLD_CELLS, "channels": 0, "keys": "projected"}
    old_file(path, "resfu-universal", config, head, {"name": ANY})
    with pytest.warns(RenamedWarning, match="bilateral-cells, which was called resfu-universal"):
        again = load_head(path)
    assert again.name == NAME and again.config == head.config
    own, backbone = METHODS[NAME].build({**_SMALL, "channels": 16}), ToyBackbone()
    config = {**_OLD_CELLS, "channels": 16, "keys": "learned"}
    old_file(path, "resfu", config, own, describe_backbone(backbone))
    with pytest.warns(RenamedWarning, match="which was called resfu then"):
        assert load_head(path, backbone).config == own.config
    paper = METHODS["resfu"].build({**HEAD, "channels": 16})
    old_file(path, "resfu", _OLD_PAPER, paper, describe_backbone(backbone))
    assert load_head(path, backbone).config == paper.config


def test_a_form_that_is_gone_says_so(tmp_path):
    path = tmp_path / "old.safetensors"
    config = {**_OLD_PAPER, "neighbours": "coarse", "sigma_space": 0.75}
    head = METHODS["resfu"].build({**HEAD, "channels": 16})
    old_file(path, "resfu", config, head, {"name": "x"})
    with pytest.raises(
        HeadError, match=r"paired differences with a prior .* train a head of resfu"
    ):
        load_head(path)


def test_the_old_name_may_be_asked_for(trained, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fmupsample.upsamplers.loading.head_folders", lambda: [trained.parent])
    with pytest.warns(RenamedWarning, match="resfu-universal is now called bilateral-cells"):
        assert load_upsampler(ToyBackbone(), "resfu-universal").name == NAME
    with pytest.warns(RenamedWarning):
        config = wanted(upsampler="resfu-universal", steps=2, validate_every=2)
    assert config.upsampler == NAME and config.upsampler_config == {"channels": 0, **_SMALL}
    report = run(pictures, tmp_path / "h.safetensors", config)
    assert load_head(report.output).config.channels == 0  # that name was for any backbone
    common = ["extract", str(pictures), "--image-size", "56", "--tokens-only"]
    assert main([*common, "-o", str(tmp_path / "f"), "--upsampler", "resfu-universal"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("the upsampler resfu-universal is now called bilateral-cells") == 1


def test_a_folder_of_the_old_name_goes_on(pictures, trained, tmp_path):
    pipeline = Pipeline(ToyBackbone(), load_head(trained, ToyBackbone()))
    sources = find_images([pictures])
    assert len(extract(pipeline, sources, tmp_path / "out").done) == len(sources)
    manifest = tmp_path / "out/manifest.jsonl"
    text = manifest.read_text()
    records = [json.loads(line) for line in text.splitlines()]
    old = {**records[0]["options"], "upsampler": "resfu-universal"}
    for record in records:
        if "options" in record:
            record["options"] = old
        record["options_hash"] = Recipe.of(old).hash
    manifest.write_text("".join(json.dumps(record) + "\n" for record in records))
    again = extract(pipeline, sources, tmp_path / "out")
    assert (len(again.done), len(again.skipped)) == (0, len(sources))


def test_a_probe_of_the_old_name_still_fits(trained):
    pipeline = Pipeline(ToyBackbone(), load_head(trained, ToyBackbone()))
    linear = LinearProbe(torch.zeros(2, 16), torch.zeros(2))
    classes = ClassTable(("a", "b"), (0, 1), ((0, 0, 0), (9, 9, 9)))
    probe = make_probe(linear, pipeline, classes=classes)
    probe.check(pipeline)
    old = replace(probe, upsampler={**probe.upsampler, "name": "resfu-universal"})
    old.check(pipeline)
    with pytest.raises(ProbeError, match="fitted on upsampler sapa"):
        replace(probe, upsampler={**probe.upsampler, "name": "sapa"}).check(pipeline)
