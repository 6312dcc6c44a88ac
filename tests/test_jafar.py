"""JAFAR: the official module's outputs, chunks, tiles, value first, use."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fmupsample
from fmupsample.errors import HeadError, ShapeError, UsageError
from fmupsample.upsamplers import JAFAR, JAFARConfig
from fmupsample.upsamplers.encoders import image as image_networks
from fmupsample.upsamplers.encoders import maps
from fmupsample.upsamplers.jafar import attention

# What github.com/PaulCouairon/JAFAR at 94d4d54 gives with random weights in float64 (every second
# row and third column), and those weights.
FILE = Path(__file__).parent / "golden/jafar.npz"
CASES = range(4)  # whole ratio, another, an output smaller than the image, one that is larger


def golden() -> dict[str, torch.Tensor]:
    with np.load(FILE) as file:
        return {name: torch.tensor(file[name]).double() for name in file.files}


def state() -> dict[str, torch.Tensor]:
    return {k.removeprefix("state/"): v for k, v in golden().items() if k.startswith("state/")}


def head() -> JAFAR:
    return fmupsample.load_official("jafar", state(), num_heads=2).requires_grad_(False)


def inputs(cells, pixels, batch=1):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, 6, *cells, generator=generator, dtype=torch.float64)
    return x, torch.randn(batch, 3, *pixels, generator=generator, dtype=torch.float64)


# --- the official module --------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_official_module(case) -> None:
    data = golden()
    x, image = (data[f"{case}/{name}"][None] for name in ("features", "image"))
    size, expected = tuple(data[f"{case}/size"].int().tolist()), data[f"{case}/upsampled"]
    out = head()(x, image, size=size)
    torch.testing.assert_close(out[0, :, ::2, ::3], expected, atol=1e-11, rtol=0)
    # With gradients the layers run as they are.
    recorded = head().requires_grad_(True)(x, image, size=size)
    assert recorded.requires_grad
    torch.testing.assert_close(recorded.detach(), out, atol=1e-11, rtol=0)


def test_official_parameters_are_checked() -> None:
    without = {k: v for k, v in state().items() if k != "query_encoder.2.norm2.bias"}
    with pytest.raises(HeadError, match=r"missing \['query_image.blocks.1.norm2.bias'\]"):
        fmupsample.load_official("jafar", without)
    with pytest.raises(HeadError, match="in_proj_weight"):
        fmupsample.load_official("jafar", {})
    wrong = state() | {"cross_decode.cross_attn.attention.q_proj_weight": torch.zeros(3, 3)}
    with pytest.raises(HeadError, match="not those of its attention"):
        fmupsample.load_official("jafar", wrong)
    with pytest.raises(UsageError, match="no option ratio"):
        fmupsample.load_official("jafar", state(), ratio=14)


def test_features_as_wide_as_the_embedding_have_one_matrix() -> None:
    official, name = state(), "cross_decode.cross_attn.attention"
    first = "key_features_encoder.0.weight"
    official[first] = torch.cat([official[first], official[first], official[first]], 1)[:, :16]
    apart = fmupsample.load_official("jafar", official, num_heads=2)
    joined = {k: v for k, v in official.items() if "_proj_weight" not in k}
    parts = [official[f"{name}.{n}_proj_weight"] for n in "qk"]
    joined[f"{name}.in_proj_weight"] = torch.cat([*parts, torch.zeros(16, 16)])
    for key, value in fmupsample.load_official("jafar", joined, num_heads=2).state_dict().items():
        assert torch.equal(value, apart.state_dict()[key])


# --- chunks, tiles, values first ------------------------------------------------------------------


def test_values_may_come_first() -> None:
    up = head()
    x, image = inputs((5, 6), (30, 37), batch=2)
    matrix, shift = torch.randn(3, 6).double(), torch.randn(3).double()
    weights = up.kernels(x, image)

    def mapped(map: torch.Tensor) -> torch.Tensor:
        return torch.einsum("vc,bchw->bvhw", matrix, map) + shift[:, None, None]

    few = up.reassemble(weights, mapped(x))
    torch.testing.assert_close(few, mapped(up(x, image)), atol=1e-12, rtol=0)
    pixels = torch.tensor([0, 5, 37 * 17 + 8, 1109, 5])
    at = up.reassemble_at(weights[1], mapped(x)[1], pixels)
    torch.testing.assert_close(at, few[1].flatten(1)[:, pixels].T, atol=1e-12, rtol=0)


def test_chunks_equal_the_whole(monkeypatch) -> None:
    query, key, value = (torch.randn(n, m).double() for n, m in ((8, 53), (8, 20), (3, 20)))
    weights = torch.stack([
        (query[part].T @ key[part]).softmax(1) for part in (slice(0, 4), slice(4, 8))
    ]).mean(0)  # fmt: skip
    for budget in (1, 5 * 2 * 20 * 8, 2**30):
        monkeypatch.setattr(attention, "_SCORE_BYTES", {"cpu": budget})
        torch.testing.assert_close(attention.attend(query, key, value, 2), value @ weights.T)
        query.requires_grad_(True)
        torch.testing.assert_close(attention.attend(query, key, value, 2), value @ weights.T)
        query.requires_grad_(False)


@pytest.mark.parametrize("most", [0, 2**40], ids=["two-maps", "three-maps"])
@pytest.mark.parametrize("budget", [1, 2**40], ids=["replayed", "stored"])
@pytest.mark.parametrize("size", [(42, 47), (21, 25)], ids=["full", "smaller"])
def test_tiles_equal_the_whole(most, budget, size, monkeypatch) -> None:
    up = head()
    x, image = inputs((6, 7), (42, 47), batch=2)
    expected = up.requires_grad_(True).kernels(x, image, size).detach()
    up.requires_grad_(False)
    monkeypatch.setattr(maps, "_TILE_PIXELS", {"cpu": 100})
    monkeypatch.setattr(image_networks, "_THREE_MAPS_BYTES", most)
    monkeypatch.setattr(JAFAR, "bytes_per_pixel", budget)
    made = []
    monkeypatch.setattr(
        maps.Stored, "empty", lambda *a, make=maps.Stored.empty: made.append(1) or make(*a)
    )
    (found,) = up.kernels_in_rows(x, image, size, 100)
    assert bool(made) == (budget > 1)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)


def test_memory_is_that_of_queries_not_of_weights() -> None:
    """A pixel's weights for all 4,096 cells would take 16 kB; all of them 1.7 GB."""
    up = JAFAR(JAFARConfig(2, embedding=8, heads=1)).requires_grad_(False)
    x, image = torch.randn(1, 2, 64, 64), torch.randn(1, 3, 320, 320)
    weights = up.kernels(x, image)
    assert weights.shape == (1, 9, 320, 320)
    probability = up.reassemble(weights, torch.ones(1, 1, 64, 64))
    torch.testing.assert_close(probability, torch.ones_like(probability))


def test_gradients() -> None:
    torch.manual_seed(0)
    up = JAFAR(JAFARConfig(3, embedding=8, heads=2)).double()
    x, image = torch.randn(1, 3, 3, 4).double(), torch.randn(1, 3, 9, 13).double()
    given = [x.requires_grad_(True), image.requires_grad_(True)]
    assert torch.autograd.gradcheck(up, given, fast_mode=True, atol=1e-6)
    up(x, image).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in up.parameters())


# --- use ------------------------------------------------------------------------------------------

BACKBONE = SimpleNamespace(
    name="toy", layer=0, channels=6, stride=(4, 4), mean=(0.5,) * 3, std=(0.25, 0.5, 1.0),
    fingerprint="0",
)  # fmt: skip


def test_it_refuses_what_it_does_not_take() -> None:
    with pytest.raises(ShapeError, match="3 channels, got 4"):
        head().kernels(torch.zeros(1, 6, 4, 4), torch.zeros(1, 4, 56, 56))
    with pytest.raises(ShapeError, match="built for 6 channels"):
        head().kernels(torch.zeros(1, 5, 4, 4), torch.zeros(1, 3, 56, 56))
    with pytest.raises(UsageError, match="channels must be more than 0"):
        JAFARConfig(channels=0)
    with pytest.raises(UsageError, match="multiple of 8"):
        JAFARConfig(6, embedding=12)


@pytest.mark.parametrize("wrapped", [False, True], ids=["parameters", "training"])
def test_a_local_checkpoint_is_a_head(wrapped, tmp_path) -> None:
    path = tmp_path / "theirs.pth"
    torch.save({"jafar": state(), "epoch": 1} if wrapped else state(), path)
    up = fmupsample.load_upsampler(BACKBONE, path)
    assert up.name == "jafar" and len(up.fingerprint) == 12
    other = SimpleNamespace(**{**vars(BACKBONE), "channels": 7})
    with pytest.raises(HeadError, match="features of 6 channels, those of toy have 7"):
        fmupsample.load_upsampler(other, path)


def test_without_a_file_one_is_told_where_it_is() -> None:
    with pytest.raises(HeadError, match="there is no head for toy"):
        fmupsample.load_upsampler(BACKBONE, "jafar")
    known = SimpleNamespace(**{**vars(BACKBONE), "name": "vit_small_patch14_dinov2.lvd142m"})
    with pytest.raises(HeadError, match=r"Apache-2.0.*download https://.*--head FILE"):
        fmupsample.load_upsampler(known, "jafar")
