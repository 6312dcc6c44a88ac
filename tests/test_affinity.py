"""Affinity heads: weights from the image alone, windows, and learning from masks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fmupsample.errors import ShapeError, UsageError
from fmupsample.ops.grid import cell_distance, cell_shares
from fmupsample.training.masks import IGNORED, mask_loss, segment_shares, segments
from fmupsample.upsamplers import Affinity, AffinityConfig, JointBilateral, Nearest
from fmupsample.upsamplers.affinity.encoder import ALIGNMENT, REACH
from fmupsample.upsamplers.normalisation import MEAN, STD

SMALL = AffinityConfig(kernel_size=3, embedding=8, width=8, detail=4, key_width=8)


def head(config: AffinityConfig = SMALL, *, spread: float = 0.3) -> Affinity:
    """One whose keys matter, in float64."""
    torch.manual_seed(0)
    made = Affinity(config)
    for parameter in made.keys.parameters():
        nn.init.normal_(parameter, std=spread)
    return made.double().eval().requires_grad_(False)


def picture(*size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(2, 3, 5, 6, generator=generator, dtype=torch.float64)
    return F.interpolate(coarse, size, mode="bicubic", align_corners=False)


# --- the weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("cells", "size"), [((4, 5), (56, 70)), ((5, 4), (57, 61))])
def test_weights_are_convex_and_stay_inside(cells, size) -> None:
    weights = head().kernels(torch.zeros(2, 1, *cells).double(), picture(*size))
    assert weights.shape == (2, 9, *size)
    assert weights.min() >= 0
    assert torch.allclose(weights.sum(1), torch.ones(2, *size).double())
    assert weights[:, :3, 0].abs().max() == 0  # no cells above the first row
    assert weights[:, 2::3, :, -1].abs().max() == 0  # nor to the right of the last column


def test_the_features_do_not_matter() -> None:
    image = picture(56, 70)
    x = torch.randn(2, 7, 4, 5, dtype=torch.float64)
    up = head()
    assert torch.equal(up.kernels(x, image), up.kernels(100 * x[:, :3], image))


def test_without_keys_it_is_joint_bilateral_upsampling_with_a_taper() -> None:
    """What is left of the score: place and colour."""
    up = head(AffinityConfig(kernel_size=5, embedding=8, width=8, detail=4, key_width=8), spread=0)
    for layer in (up.encoder.from_coarse, up.encoder.from_fine):
        nn.init.zeros_(layer.weight)
    nn.init.zeros_(up.encoder.from_coarse.bias)
    cells, size = (6, 7), (84, 98)
    x, image = torch.zeros(2, 1, *cells).double(), picture(*size)
    expected = JointBilateral(kernel_size=5, sigma_space=0.75, sigma_range=0.6).kernels(x, image)
    down, across = (
        torch.stack([1 - (2 * cell_distance(n, m, d) / 5) ** 2 for d in range(-2, 3)])
        for n, m in zip(cells, size, strict=True)
    )
    taper = down[:, None, :, None] * across[None, :, None, :]
    expected = expected * taper.flatten(0, 1)
    expected = expected / expected.sum(1, keepdim=True)
    assert torch.allclose(up.kernels(x, image), expected, atol=1e-12)


def test_there_is_no_seam_where_a_pixels_own_cell_changes() -> None:
    """At a high ratio the step to the next pixel across a border is like those on either side."""
    up = head()
    value = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    image = F.interpolate(picture(40, 40)[:1], (480, 480), mode="bilinear", align_corners=False)
    steps = up(value, image).diff(dim=3).abs().amax((0, 1, 2))  # [479]
    across, before, after = steps[119::120], steps[117:-2:120], steps[121::120]
    assert torch.allclose(across, (before + after) / 2, rtol=0.02)


# --- windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cells", "ratio"), [((26, 40), (14, 14)), ((23, 31), (14.3, 13.7))])
def test_windows_equal_the_whole(cells, ratio) -> None:
    size = tuple(round(n * r) for n, r in zip(cells, ratio, strict=True))
    x, image = torch.zeros(1, 1, *cells).double(), picture(*size)[:1]
    up = head()
    bands = list(up.kernels_in_rows(x, image, size, 30_000))
    assert len(bands) > 1
    assert len(up._windows(cells, size, 30_000).__next__()[1]) > 1
    assert torch.allclose(torch.cat(bands, 2), up.kernels(x, image), atol=1e-12)


def test_the_reach_of_the_encoder_is_what_it_says() -> None:
    """A changed pixel changes nothing beyond it."""
    encoder = head().encoder
    side = 3 * REACH // ALIGNMENT * ALIGNMENT
    image = picture(ALIGNMENT, side)[:1]
    other = image.clone()
    other[..., 0] += 3
    changed = (encoder(image) - encoder(other)).abs().amax((0, 1, 2)) > 0
    last = int(changed.nonzero().max())
    assert REACH - 2 * ALIGNMENT < last <= REACH


def test_cell_shares_take_the_means_of_adaptive_pooling() -> None:
    x = torch.randn(1, 1, 11, 17, dtype=torch.float64)
    down = cell_shares(4, 11, slice(0, 4), slice(0, 11))
    across = cell_shares(5, 17, slice(0, 5), slice(0, 17))
    assert torch.allclose(down @ x @ across.T, F.adaptive_avg_pool2d(x, (4, 5)))
    assert torch.equal(cell_shares(4, 11, slice(1, 3), slice(2, 9)), down[1:3, 2:9])


# --- use ------------------------------------------------------------------------------------------


def test_other_normalisations_are_brought_about() -> None:
    up, image = head(), picture(56, 70)
    x = torch.zeros(2, 1, 4, 5).double()
    expected = up.kernels(x, image)
    mean, std = (torch.tensor(v).double()[:, None, None] for v in (MEAN, STD))
    up.use_with((0.5, 0.5, 0.5), (0.25, 0.5, 1.0))
    other = (image * std + mean - 0.5) / torch.tensor([0.25, 0.5, 1.0])[:, None, None]
    assert torch.allclose(up.kernels(x, other), expected, atol=1e-6)


def test_it_refuses_what_it_does_not_take() -> None:
    with pytest.raises(ShapeError, match="3 channels, got 4"):
        head().kernels(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 56, 56))
    with pytest.raises(UsageError, match="channels must be 0"):
        AffinityConfig(channels=8)
    with pytest.raises(UsageError, match="odd"):
        AffinityConfig(kernel_size=4)


def test_gradients() -> None:
    up = head().requires_grad_(True)
    x = torch.zeros(1, 1, 2, 2).double()
    image = picture(16, 16)[:1].requires_grad_(True)

    def weights(image: torch.Tensor) -> torch.Tensor:
        return up.kernels(x, image)

    assert torch.autograd.gradcheck(weights, (image,), fast_mode=True)
    weights(image).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in up.parameters())


# --- masks ----------------------------------------------------------------------------------------


def test_segments_are_numbered_by_size_within_each_image() -> None:
    labels = torch.tensor([[[7, 7, 7, IGNORED], [3, 3, 7, 7]], [[0, 1, 1, 1], [0, 1, 1, 1]]])
    assert segments(labels).tolist() == [
        [[0, 0, 0, IGNORED], [1, 1, 0, 0]],
        [[1, 0, 0, 0], [1, 0, 0, 0]],
    ]


def test_shares_of_segments() -> None:
    numbers = torch.tensor([[[0, 0, 1, 1], [0, 1, 1, IGNORED]]])
    shares = segment_shares(numbers, (1, 2))
    assert shares[0, :, 0].tolist() == [[0.75, 0.0], [0.25, 0.75]]
    wide = segment_shares(numbers[:, :, :3].repeat(1, 4, 4), (4, 6), 2.0)
    assert wide.shape == (1, 2, 4, 6)
    assert torch.allclose(wide.sum(1), torch.ones(1, 4, 6))


def test_the_loss_of_known_weights() -> None:
    """Two segments that meet inside the second of three cells; nearest takes a cell's own share."""
    numbers = torch.tensor([0] * 6 + [1] * 6).view(1, 1, 12).repeat(1, 4, 1)
    shares = segment_shares(numbers, (1, 3))  # cells of 4 x 4: 1, 1/2 and 0 of segment 0
    up = Nearest()
    weights = up.kernels(shares, size=(4, 12))
    loss, wrong = mask_loss(up, weights, numbers, shares)
    expected = -torch.log(torch.tensor([1.0] * 4 + [0.5] * 4 + [1.0] * 4)).mean()
    assert torch.allclose(loss, expected)
    assert wrong == 2 / 12  # of equal shares the first is taken
    # Ignored pixels, and images that count nothing, do not change it.
    both = torch.cat([numbers, 1 - numbers])
    shares = torch.cat([shares, shares])
    weights = torch.cat([weights, weights])
    half, _ = mask_loss(up, weights, both, shares, torch.tensor([1.0, 0.0]))
    assert torch.allclose(half, expected)


def test_a_head_learns_from_masks() -> None:
    """A disc whose colour is like the ground's but for noise, told by its mask."""
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    inside = ((y - 30) ** 2 + (x - 34) ** 2) < 20**2
    image = torch.where(inside, 0.3, -0.3).repeat(1, 3, 1, 1) + 0.05 * torch.randn(1, 3, 64, 64)
    numbers = segments(inside.long()[None])
    shares = segment_shares(numbers, (8, 8))
    up = Affinity(SMALL)
    optimizer = torch.optim.AdamW(up.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss, _ = mask_loss(up, up.kernels(shares, image), numbers, shares)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
