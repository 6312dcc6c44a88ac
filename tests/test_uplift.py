"""UPLiFT: the official module's outputs, weights, use."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fmupsample
from fmupsample.errors import HeadError, ShapeError, UsageError
from fmupsample.upsamplers import UPLiFT, UPLiFTConfig

# What github.com/mwalmer-umd/UPLiFT at 85f09ee gives with random weights in float64 (every second
# row and third column), and those weights.
FILE = Path(__file__).parent / "golden/uplift.npz"
CASES = range(4)  # patches of 14 and of 16 pixels, twice and three times instead of four


def golden() -> dict[str, torch.Tensor]:
    with np.load(FILE) as file:
        return {name: torch.tensor(file[name]).double() for name in file.files}


def state() -> dict[str, torch.Tensor]:
    return {k.removeprefix("state/"): v for k, v in golden().items() if k.startswith("state/")}


def head() -> UPLiFT:
    return fmupsample.load_official("uplift", state()).requires_grad_(False)


def small() -> UPLiFT:
    torch.manual_seed(0)
    return UPLiFT(UPLiFTConfig(3, width=2, guide=8)).double().eval()


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_official_module(case) -> None:
    data = golden()
    x, image = (data[f"{case}/{name}"][None] for name in ("features", "image"))
    out = head()(x, image, size=tuple(data[f"{case}/size"].int().tolist()))
    expected = data[f"{case}/upsampled"]
    torch.testing.assert_close(out[0, :, ::2, ::3], expected, atol=1e-11, rtol=0)


def test_official_parameters_are_checked() -> None:
    without = {k: v for k, v in state().items() if k != "decoder.up_1.up.bias"}
    with pytest.raises(HeadError, match=r"missing \['enlarge.bias'\]"):
        fmupsample.load_official("uplift", without)
    with pytest.raises(HeadError, match=r"encoder\.block_0"):
        fmupsample.load_official("uplift", {})


def test_outputs_are_means_of_features() -> None:
    x, image = torch.rand(2, 3, 4, 5).double(), torch.randn(2, 3, 56, 70).double()
    up = small()
    out = up(x, image)
    assert x.min() <= out.min() and out.max() <= x.max()
    constant = up(torch.full_like(x, 2.0), image)
    torch.testing.assert_close(constant, torch.full_like(constant, 2.0))
    with pytest.raises(UsageError, match="not linear"):
        up.kernels(x, image)


def test_steps_that_a_size_does_not_need_are_left_out() -> None:
    up, x, image = small(), torch.rand(1, 3, 4, 5).double(), torch.randn(1, 3, 64, 80).double()
    twice = up(x, image, size=(8, 10))
    torch.testing.assert_close(up(x, image, size=(4, 5)), x)
    assert twice.shape == (1, 3, 8, 10) and up(x, image, size=(130, 161)).shape[2:] == (130, 161)


def test_gradients() -> None:
    up = small()
    x, image = torch.randn(1, 3, 2, 3).double(), torch.randn(1, 3, 9, 13).double()
    given = [x.requires_grad_(True), image.requires_grad_(True)]
    assert torch.autograd.gradcheck(up, given, fast_mode=True, atol=1e-6)
    up.train()(x, image).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in up.parameters())


def test_half_precision_features() -> None:
    up = head().float()
    x, image = torch.randn(1, 6, 4, 5), torch.randn(1, 3, 56, 70)
    out = up(x.half(), image.half())
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), up(x, image), atol=2e-2, rtol=0)


def test_it_refuses_what_it_does_not_take() -> None:
    with pytest.raises(ShapeError, match="3 channels, got 4"):
        head()(torch.zeros(1, 6, 4, 4), torch.zeros(1, 4, 56, 56))
    with pytest.raises(ShapeError, match="built for 6 channels"):
        head()(torch.zeros(1, 5, 4, 4), torch.zeros(1, 3, 56, 56))
    with pytest.raises(UsageError, match="stages must be 1 to 6"):
        UPLiFTConfig(6, stages=0)


BACKBONE = SimpleNamespace(
    name="toy", layer=0, channels=6, stride=(4, 4), mean=(0.5,) * 3, std=(0.25, 0.5, 1.0),
    fingerprint="0",
)  # fmt: skip


@pytest.mark.parametrize("name", ["theirs.safetensors", "theirs.pth"])
def test_a_local_checkpoint_is_a_head(name, tmp_path) -> None:
    path = tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)(state(), path)
    up = fmupsample.load_upsampler(BACKBONE, path)
    assert up.name == "uplift" and up.config == UPLiFTConfig(6, width=2, guide=20)
    assert len(up.fingerprint) == 12


def test_other_safetensors_are_refused_as_before(tmp_path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(HeadError, match="not a head file of this version"):
        fmupsample.load_upsampler(BACKBONE, path)
