"""AnyUp: the official module's outputs, windows of cells, tiles and bands, use."""

import hashlib
import io
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from reference import anyup as reference

import fmupsample
from fmupsample.errors import HeadError, ShapeError, UsageError
from fmupsample.ops.grid import plan_axis
from fmupsample.upsamplers import AnyUp, AnyUpConfig
from fmupsample.upsamplers.anyup.attention import WindowAttention, window_logits
from fmupsample.upsamplers.encoders import image as image_networks
from fmupsample.upsamplers.encoders import maps
from fmupsample.upsamplers.encoders.averages import CellMeans
from fmupsample.upsamplers.encoders.maps import Moments, Replayed, Stored
from fmupsample.upsamplers.encoders.winograd import Convolution3x3
from fmupsample.upsamplers.normalisation import MEAN, STD
from fmupsample.upsamplers.official import checkpoints


def head(ratio: float = 0.1, seed: int = 0) -> AnyUp:
    state = reference.random_state(seed=seed)
    up = fmupsample.load_official("anyup", state, window_ratio=ratio)
    return up.requires_grad_(False)


def inputs(cells, pixels, channels=5, batch=1):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, channels, *cells, generator=generator, dtype=torch.float64)
    return x, torch.randn(batch, 3, *pixels, generator=generator, dtype=torch.float64)


# --- the official module --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "pixels", "size", "ratio"),
    [
        ((4, 5), (16, 20), (16, 20), 0.1),
        ((6, 7), (25, 29), (25, 29), 0.25),
        ((12, 3), (24, 30), (13, 11), 0.2),
        ((3, 4), (12, 16), (17, 20), 1.0),
    ],
    ids=["whole-ratio", "odd", "smaller-output", "larger-output"],
)
def test_it_is_the_official_module(cells, pixels, size, ratio) -> None:
    x, image = inputs(cells, pixels)
    expected = reference.upsample(reference.random_state(), image[0], x[0], size, ratio=ratio)
    out = head(ratio)(x, image, size=size)
    torch.testing.assert_close(out[0], expected, atol=1e-11, rtol=0)
    # With gradients the layers run as they are.
    recorded = head(ratio).requires_grad_(True)(x, image, size=size)
    assert recorded.requires_grad
    torch.testing.assert_close(recorded[0].detach(), expected, atol=1e-11, rtol=0)


def test_official_parameters_are_checked() -> None:
    state = reference.random_state()
    without = {k: v for k, v in state.items() if k != "query_encoder.2.block.3.bias"}
    with pytest.raises(HeadError, match=r"missing \['query_image.blocks.1.norm2.bias'\]"):
        fmupsample.load_official("anyup", without)
    with pytest.raises(HeadError, match="in_proj_weight"):
        fmupsample.load_official("anyup", {})
    with pytest.raises(UsageError, match="no option ratio"):
        fmupsample.load_official("anyup", state, ratio=14)


# --- windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.1, 0.3])
@pytest.mark.parametrize(("cells", "pixels"), [(4, 56), (10, 33), (32, 448), (1, 7), (30, 30)])
def test_windows_are_the_official_ones(cells, pixels, ratio) -> None:
    up = AnyUp(AnyUpConfig(embedding=8, window_ratio=ratio))
    reach = up.kernel_size_for((cells, cells)) // 2
    inside = reference.window((pixels, 1), (cells, 1), ratio)
    logits = window_logits(cells, pixels, ratio, reach)
    assert inside.sum() == (logits == 0).sum()  # K x K cells hold all of them
    base = plan_axis(cells, pixels, False).base
    for offset, logit in enumerate(logits.T, -reach):
        exists = (base + offset >= 0) & (base + offset < cells)
        assert not (logit[~exists] == 0).any()
        expected = inside[torch.arange(pixels), (base + offset).clamp(0, cells - 1)]
        assert torch.equal((logit == 0)[exists], expected[exists])


def test_weights_are_convex_and_zero_outside() -> None:
    x, image = inputs((10, 12), (40, 50))
    weights = head().kernels(x, image)
    assert weights.shape == (1, 25, 40, 50)
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(1), torch.ones(1, 40, 50).double())
    assert weights.unflatten(1, (5, 5))[:, :2, :, :4].abs().max() == 0  # above the first row
    assert head().kernel_size is None and head().kernel_size_for((10, 12)) == 5


def test_a_window_of_one_cell() -> None:
    x, image = inputs((1, 1), (6, 7))
    weights = head().kernels(x, image)
    assert weights.shape == (1, 1, 6, 7) and torch.equal(weights, torch.ones_like(weights))


def test_values_may_come_first() -> None:
    up = head()
    x, image = inputs((5, 6), (30, 36), channels=7)
    matrix, shift = torch.randn(3, 7).double(), torch.randn(3).double()
    weights = up.kernels(x, image)

    def mapped(map: torch.Tensor) -> torch.Tensor:
        return torch.einsum("vc,bchw->bvhw", matrix, map) + shift[:, None, None]

    few = up.reassemble(weights, mapped(x))
    torch.testing.assert_close(few, mapped(up(x, image)), atol=1e-12, rtol=0)
    pixels = torch.tensor([0, 5, 36 * 17 + 8, 1079])
    at = up.reassemble_at(weights[0], mapped(x)[0], pixels)
    torch.testing.assert_close(at, few[0].flatten(1)[:, pixels].T, atol=1e-12, rtol=0)


# --- tiles and bands ------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "replayed"])
@pytest.mark.parametrize("size", [(42, 47), (21, 25)], ids=["full", "smaller"])
def test_bands_equal_the_whole(stored, size, monkeypatch) -> None:
    up = head()
    x, image = inputs((6, 7), (42, 47), batch=2)
    expected = up.kernels(x, image, size)
    monkeypatch.setattr(maps, "_TILE_PIXELS", {"cpu": 100})
    monkeypatch.setattr(AnyUp, "bytes_per_pixel", 40_000 if stored else 5_000)
    made = []
    monkeypatch.setattr(Stored, "empty", lambda *a, make=Stored.empty: made.append(1) or make(*a))
    bands = list(up.kernels_in_rows(x, image, size, 100))
    assert len(bands) > 2 and bool(made) == stored
    torch.testing.assert_close(torch.cat(bands, 2), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("most", [0, 2**40], ids=["two-maps", "three-maps"])
def test_fewer_maps_make_the_same(most, monkeypatch) -> None:
    up = head()
    x, image = inputs((6, 7), (42, 47))
    expected = up.requires_grad_(True).kernels(x, image).detach()
    up.requires_grad_(False)
    monkeypatch.setattr(image_networks, "_THREE_MAPS_BYTES", most)
    torch.testing.assert_close(up.kernels(x, image), expected, atol=1e-12, rtol=0)


def test_a_small_budget_of_scores_cuts_rows(monkeypatch) -> None:
    from fmupsample.upsamplers.anyup import attention

    up = head()
    x, image = inputs((3, 4), (33, 40))
    expected = up.kernels(x, image)
    monkeypatch.setattr(attention, "_SCORE_BYTES", {"cpu": 1})
    torch.testing.assert_close(up.kernels(x, image), expected, atol=1e-12, rtol=0)
    keys = torch.zeros(4, 4, 3, 4)
    parts = list(WindowAttention(keys, (33, 40), 0.1).parts(slice(2, 30)))
    assert [(p.start, p.stop) for p in parts] == [(y, y + 1) for y in range(2, 30)]


def test_moments_and_means_of_tiles() -> None:
    data = torch.randn(16, 9, 11, dtype=torch.float64) + 3
    moments = Moments()
    means = CellMeans((4, 3), (9, 11))
    for rows in (slice(0, 2), slice(2, 7), slice(7, 9)):
        moments.add(data[:, rows].flatten(1))
        means.add(data[:, rows].flatten(1), rows)
    mean, variance = moments.of_whole()
    groups = data.reshape(8, -1)
    torch.testing.assert_close(mean[0], groups.mean(1))
    torch.testing.assert_close(variance[0], groups.var(1, unbiased=False))
    pooled = torch.nn.functional.adaptive_avg_pool2d(data, (4, 3))
    torch.testing.assert_close(means.whole(), pooled)


def test_a_replayed_map_is_the_stored_one(monkeypatch) -> None:
    monkeypatch.setattr(maps, "_TILE_PIXELS", {"cpu": 20})
    data = torch.randn(8, 9, 11, dtype=torch.float64)
    replayed = Replayed(lambda rows: data[:, rows].flatten(1), (9, 11), data.device)
    stored = replayed.then(lambda tile, rows: 2 * tile, Stored(torch.empty_like(data)))
    other = replayed.then(lambda tile, rows: 2 * tile)
    assert isinstance(stored, Stored) and torch.equal(stored.data, 2 * data)
    assert torch.equal(other.read(slice(3, 6)), stored.read(slice(3, 6)))
    for a, b in zip(stored.moments(), other.moments(), strict=True):
        torch.testing.assert_close(a, b)
    assert len(list(stored.tiles())) == 9


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_the_convolution(rows) -> None:
    part = torch.randn(5, rows + 2, 9, dtype=torch.float64)
    weight = torch.randn(6, 5, 3, 3, dtype=torch.float64)
    expected = torch.nn.functional.conv2d(part[None], weight, padding=(0, 1))[0]
    found = Convolution3x3(weight)(part)
    torch.testing.assert_close(found.transpose(0, 1), expected, atol=1e-12, rtol=0)


# --- use ------------------------------------------------------------------------------------------


def test_other_normalisations_are_brought_about() -> None:
    up = head()
    x, image = inputs((4, 5), (20, 25))
    expected = up.kernels(x, image)
    mean, std = (torch.tensor(v).double()[:, None, None] for v in (MEAN, STD))
    up.use_with((0.5, 0.5, 0.5), (0.25, 0.5, 1.0))
    other = (image * std + mean - 0.5) / torch.tensor([0.25, 0.5, 1.0])[:, None, None]
    torch.testing.assert_close(up.kernels(x, other), expected, atol=1e-6, rtol=0)


def test_it_refuses_what_it_does_not_take() -> None:
    with pytest.raises(ShapeError, match="3 channels, got 4"):
        head().kernels(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 56, 56))
    with pytest.raises(UsageError, match="channels must be 0"):
        AnyUpConfig(channels=8)
    with pytest.raises(UsageError, match="multiple of 8"):
        AnyUpConfig(embedding=12)
    with pytest.raises(UsageError, match="window_ratio"):
        AnyUpConfig(window_ratio=0)
    config = AnyUpConfig(embedding=16, heads=2)
    assert AnyUpConfig.from_dict(config.to_dict()) == config


def test_gradients() -> None:
    torch.manual_seed(0)
    up = AnyUp(AnyUpConfig(embedding=8, heads=2, feature_kernel=3)).double()
    x, image = (t.requires_grad_(True) for t in inputs((3, 4), (9, 13), channels=3))
    assert torch.autograd.gradcheck(up.kernels, (x, image), fast_mode=True, atol=1e-6)
    up(x, image).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in up.parameters())


def test_half_precision_features() -> None:
    up = head().float()
    x, image = inputs((4, 5), (20, 25))
    expected = up(x.float(), image.float())
    out = up(x.half(), image.half())
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=0)


# --- checkpoints ----------------------------------------------------------------------------------

BACKBONE = SimpleNamespace(
    name="toy", layer=0, channels=5, stride=(4, 4), mean=(0.5,) * 3, std=(0.25, 0.5, 1.0),
    fingerprint="0",
)  # fmt: skip


def test_a_local_checkpoint_is_a_head(tmp_path) -> None:
    path = tmp_path / "theirs.pth"
    torch.save(reference.random_state(), path)
    up = fmupsample.load_upsampler(BACKBONE, path)
    x, image = inputs((4, 5), (16, 20))
    expected = head()
    expected.use_with(BACKBONE.mean, BACKBONE.std)
    assert torch.equal(up.kernels(x, image), expected.kernels(x, image))
    assert len(up.fingerprint) == 12
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(HeadError, match="no parameters of a method"):
        fmupsample.load_upsampler(BACKBONE, path)
    torch.save(SimpleNamespace(a=1), path)
    with pytest.raises(HeadError, match="not a readable checkpoint"):
        fmupsample.load_upsampler(BACKBONE, path)
    with pytest.raises(HeadError, match="there is no head file"):
        fmupsample.load_upsampler(BACKBONE, tmp_path / "none.pth")


def test_the_published_checkpoint_is_fetched_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoints, "cache_folder", lambda: tmp_path)
    with pytest.raises(HeadError, match=r"HF_HUB_OFFLINE.*download https.*--head FILE"):
        fmupsample.load_upsampler(BACKBONE, "anyup")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    buffer = io.BytesIO()
    torch.save(reference.random_state(), buffer)
    data = buffer.getvalue()
    asked = []

    def served(url, timeout):
        asked.append(url)
        return io.BytesIO(data)

    monkeypatch.setattr(checkpoints, "urlopen", served)
    with pytest.raises(HeadError, match="another file than the published anyup_multi_backbone"):
        fmupsample.load_upsampler(BACKBONE, "anyup")
    first, *others = checkpoints.CHECKPOINTS
    pinned = replace(first, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", (pinned, *others))
    for _ in range(2):
        assert fmupsample.load_upsampler(BACKBONE, "anyup").name == "anyup"
    assert asked == [first.url] * 2 and pinned.path.is_file()

    def unreachable(url, timeout):
        raise OSError("no route to host")

    pinned.path.unlink()
    monkeypatch.setattr(checkpoints, "urlopen", unreachable)
    with pytest.raises(HeadError, match=r"cannot be downloaded \(no route to host\): download"):
        fmupsample.load_upsampler(BACKBONE, "anyup")
