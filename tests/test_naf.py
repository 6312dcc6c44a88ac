"""NAF: the official module's outputs, neighbourhoods, bands of rows, use."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fmupsample
from fmupsample.errors import HeadError, ShapeError, UsageError
from fmupsample.upsamplers import NAF, NAFConfig
from fmupsample.upsamplers.encoders import maps
from fmupsample.upsamplers.encoders.maps import Replayed, Stored
from fmupsample.upsamplers.encoders.runs import Runs
from fmupsample.upsamplers.encoders.winograd import Convolution3x3
from fmupsample.upsamplers.naf import attention, module
from fmupsample.upsamplers.naf.attention import neighbours, runs
from fmupsample.upsamplers.naf.encoder import Encoder
from fmupsample.upsamplers.naf.rows import encoded

# What github.com/valeoai/NAF at ad4e24d gives with random weights in float64 (every second row and
# third column), and those weights. In the place of NATTEN's kernels stood its definition: lists of
# a pixel's neighbours.
FILE = Path(__file__).parent / "golden/naf.npz"
# A whole ratio, another, an output smaller than the image, one more than four times smaller, and
# one that is larger.
CASES = range(5)


def golden() -> dict[str, torch.Tensor]:
    with np.load(FILE) as file:
        return {name: torch.tensor(file[name]).double() for name in file.files}


def state() -> dict[str, torch.Tensor]:
    return {k.removeprefix("state/"): v for k, v in golden().items() if k.startswith("state/")}


def head() -> NAF:
    return fmupsample.load_official("naf", state(), heads_attn=2).requires_grad_(False)


def inputs(cells, pixels, batch=1):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, 4, *cells, generator=generator, dtype=torch.float64)
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
    without = {k: v for k, v in state().items() if k != "image_encoder.sem_encoder.2.norm2.bias"}
    with pytest.raises(HeadError, match=r"missing \['spatial.blocks.1.norm2.bias'\]"):
        fmupsample.load_official("naf", without)
    with pytest.raises(HeadError, match=r"image_encoder\.rope\.periods"):
        fmupsample.load_official("naf", {"image_encoder.encoder.0.weight": torch.zeros(8, 3, 1, 1)})
    with pytest.raises(UsageError, match="no option dim"):
        fmupsample.load_official("naf", state(), dim=256)


# --- neighbourhoods -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "pixels", "kernel"),
    [(16, 224, 9), (9, 40, 9), (10, 33, 5), (4, 56, 9), (1, 7, 9), (12, 12, 3), (11, 43, 4)],
)
def test_neighbours_are_natten_s(cells, pixels, kernel) -> None:
    found = neighbours(cells, pixels, kernel)
    dilation = pixels // cells
    k = min(kernel, pixels // dilation)
    for pixel in range(pixels):
        alike = list(range(pixel % dilation, pixels, dilation))
        first = min(max(alike.index(pixel) - k // 2, 0), len(alike) - k)
        expected = [(2 * p + 1) * cells // (2 * pixels) for p in alike[first : first + k]]
        assert found[pixel].tolist() == expected


@pytest.mark.parametrize(("cells", "pixels"), [(16, 224), (10, 33), (1, 5), (7, 7)])
def test_runs_hold_every_pixel_once(cells, pixels) -> None:
    axis = Runs(*runs(cells, pixels, 9))
    assert torch.equal(axis.slots[axis.filled], torch.arange(pixels))
    near = neighbours(cells, pixels, 9)
    for group, (first, last) in enumerate(zip(axis.starts[:-1], axis.starts[1:], strict=True)):
        assert (near[first:last] == axis.cells[group]).all()
    if pixels % cells == 0:
        assert len(axis.slots) == pixels  # nothing is computed in vain


def test_few_cells_are_attended_to_as_a_whole() -> None:
    x, image = inputs((2, 3), (28, 42))
    constant = head()(torch.full_like(x, 2.0), image)
    torch.testing.assert_close(constant, torch.full_like(constant, 2.0))
    far = x.clone()
    far[..., -1, -1] += 1
    assert (head()(far, image) != head()(x, image)).all()


def test_heads_weigh_their_own_channels() -> None:
    x, image = inputs((9, 10), (27, 30))
    same = x[:, :2].repeat(1, 2, 1, 1)
    out = head()(same, image)
    assert (out[:, :2] - out[:, 2:]).abs().max() > 1e-3
    up = head()
    assert not up.linear_in_value and up.neighbours is None
    with pytest.raises(UsageError, match="not linear"):
        up.kernels(x, image)
    with pytest.raises(UsageError, match="not linear"):
        up.reassemble(torch.zeros(1, 9, 27, 30), x)


# --- bands of rows --------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "replayed"])
@pytest.mark.parametrize("size", [(42, 47), (21, 25)], ids=["full", "smaller"])
def test_bands_equal_the_whole(stored, size, monkeypatch) -> None:
    up = head()
    x, image = inputs((6, 7), (42, 47), batch=2)
    expected = up.requires_grad_(True)(x, image, size=size).detach()
    up.requires_grad_(False)
    monkeypatch.setattr(maps, "_TILE_PIXELS", {"cpu": 100})
    monkeypatch.setattr(attention, "_SCORE_BYTES", {"cpu": 1})
    monkeypatch.setattr(module, "_STORED_BYTES", 2**40 if stored else 0)
    found = up(x, image, size=size)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize("size", [(1, 7), (9, 1), (2, 2), (7, 9)])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_the_encoder_in_rows(size, kernel_size, monkeypatch) -> None:
    monkeypatch.setattr(maps, "_TILE_PIXELS", {"cpu": 3 * size[1]})
    torch.manual_seed(0)
    encoder = Encoder(8, kernel_size, 2).double().requires_grad_(False)
    image = torch.randn(3, *size, dtype=torch.float64)
    expected = encoder(image[None])[0]
    source = Replayed(lambda part: image[:, part].flatten(1), size, image.device)
    stored = tuple(Stored(torch.empty(8, *size, dtype=torch.float64)) for _ in range(2))
    for given in (None, stored):
        found = encoded(source, encoder, given)
        parts = [found.read(slice(y, y + 1)) for y in range(size[0])]
        torch.testing.assert_close(torch.cat(parts, 1), expected.flatten(1), atol=1e-12, rtol=0)
    torch.testing.assert_close(stored[0].data, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("width", [1, 2, 9])
def test_the_mirrored_convolution(width) -> None:
    part = torch.randn(5, 6, width, dtype=torch.float64)
    weight = torch.randn(6, 5, 3, 3, dtype=torch.float64)
    mode = "reflect" if width > 1 else "replicate"
    padded = torch.nn.functional.pad(part, (1, 1), mode=mode)
    expected = torch.nn.functional.conv2d(padded[None], weight)[0]
    found = Convolution3x3(weight, mirrored=True)(part)
    torch.testing.assert_close(found.transpose(0, 1), expected, atol=1e-12, rtol=0)


# --- use ------------------------------------------------------------------------------------------

BACKBONE = SimpleNamespace(
    name="toy", layer=0, channels=4, stride=(4, 4), mean=(0.5,) * 3, std=(0.25, 0.5, 1.0),
    fingerprint="0",
)  # fmt: skip


def test_it_refuses_what_it_does_not_take() -> None:
    with pytest.raises(ShapeError, match="3 channels, got 4"):
        head()(torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 56, 56))
    with pytest.raises(ShapeError, match="among 2 heads: 5 channels"):
        head()(torch.zeros(1, 5, 4, 4), torch.zeros(1, 3, 56, 56))
    with pytest.raises(UsageError, match="channels must be 0"):
        NAFConfig(channels=8)
    with pytest.raises(UsageError, match="multiple of 16"):
        NAFConfig(embedding=24)
    with pytest.raises(UsageError, match="must be odd"):
        NAFConfig(kernel_size=8)


def test_gradients() -> None:
    torch.manual_seed(0)
    up = NAF(NAFConfig(embedding=16, heads=2, rotary_heads=1, kernel_size=3, blocks=1)).double()
    x, image = (t.requires_grad_(True) for t in inputs((4, 5), (9, 13)))
    assert torch.autograd.gradcheck(up, (x, image), fast_mode=True, atol=1e-6)
    up(x, image).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in up.parameters())


def test_half_precision_features() -> None:
    up = head().float()
    x, image = inputs((4, 5), (20, 25))
    expected = up(x.float(), image.float())
    out = up(x.half(), image.half())
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=0)


def test_a_local_checkpoint_is_a_head_for_any_backbone(tmp_path) -> None:
    path = tmp_path / "theirs.pth"
    torch.save(NAF(NAFConfig(embedding=32)).state_dict(), path)
    with pytest.raises(HeadError, match=r"no parameters .* \(anyup, jafar, naf, uplift\)"):
        fmupsample.load_upsampler(BACKBONE, path)  # our names are those of head files
    torch.save(state(), path)
    up = fmupsample.load_upsampler(BACKBONE, path)
    assert up.name == "naf" and up.config == NAFConfig(embedding=16, rotary_heads=2)
    assert len(up.fingerprint) == 12 and up.renormalise.gain is not None


def test_without_a_file_one_is_told_where_it_is() -> None:
    with pytest.raises(HeadError, match=r"Apache-2.0.*download https://.*naf_release.*--head FILE"):
        fmupsample.load_upsampler(BACKBONE, "naf")
