"""The PCA basis: the textbook where the data are clean, calm where they are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fmupsample.draw.foreground import Split, otsu
from fmupsample.draw.pca import PCABasis, outlier_weights, sample_tokens
from fmupsample.errors import OutputError, ShapeError, UsageError

META = {"backbone": "toy.v1", "layer": "11"}


def cloud(n: int = 3000, c: int = 24, seed: int = 0) -> torch.Tensor:
    """Tokens [n, c] with four strong directions of clearly different strength."""
    g = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(c, c, generator=g))[0]
    strength = torch.full((c,), 0.1)
    strength[:4] = torch.tensor([5.0, 3.5, 2.5, 1.5])
    return torch.randn(n, c, generator=g) * strength @ axes.T + torch.randn(c, generator=g) * 3


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest angle between matching rows, as 1 - |cos|."""
    return float((1 - (F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(1).abs()).max())


def test_plain_fit_is_numpys_svd():
    tokens = cloud()
    basis = PCABasis.fit(tokens, robust=False)
    x = tokens.double().numpy()
    _, singular, rows = np.linalg.svd(x - x.mean(0), full_matrices=False)
    np.testing.assert_allclose(basis.mean, x.mean(0), atol=1e-5)
    assert angle(basis.components, torch.from_numpy(rows[:3]).float()) < 1e-6
    np.testing.assert_allclose(basis.explained, singular[:3] ** 2 / (singular**2).sum(), rtol=1e-4)
    scores = (x - x.mean(0)) @ basis.components.double().numpy().T
    np.testing.assert_allclose(basis.low, np.percentile(scores, 1, axis=0), atol=1e-3)
    np.testing.assert_allclose(basis.high, np.percentile(scores, 99, axis=0), atol=1e-3)


def test_robust_fit_agrees_with_the_plain_one_on_clean_tokens():
    tokens = cloud()
    robust, plain = PCABasis.fit(tokens), PCABasis.fit(tokens, robust=False)
    assert angle(robust.components, plain.components) < 0.01
    torch.testing.assert_close(robust.components @ robust.components.T, torch.eye(3))


@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_one_percent_of_huge_tokens_steals_no_component(scale):
    clean = cloud()
    tokens = clean.clone()
    bad = torch.arange(0, len(tokens), 100)
    direction = F.normalize(torch.randn(24, generator=torch.Generator().manual_seed(9)), dim=0)
    tokens[bad] += scale * clean.norm(dim=1).median() * direction
    wanted = PCABasis.fit(clean)
    basis = PCABasis.fit(tokens)
    assert angle(basis.components, wanted.components) < 0.01
    torch.testing.assert_close(basis.low, wanted.low, rtol=0.1, atol=0.2)
    torch.testing.assert_close(basis.high, wanted.high, rtol=0.1, atol=0.2)
    # The plain fit is indeed spoilt by them, so this test can fail.
    assert angle(PCABasis.fit(tokens, robust=False).components, wanted.components) > 0.3
    assert (outlier_weights(tokens.double())[bad] == 0).all()


def test_tokens_that_are_not_finite_are_left_out():
    tokens = cloud()
    spoilt = torch.cat([tokens, torch.full((5, 24), torch.nan), torch.full((2, 24), torch.inf)])
    assert PCABasis.fit(spoilt).fingerprint == PCABasis.fit(tokens).fingerprint


def test_signs_do_not_depend_on_the_run_nor_on_a_few_more_tokens():
    tokens = cloud()
    first = PCABasis.fit(tokens)
    assert PCABasis.fit(tokens.clone()).fingerprint == first.fingerprint
    shuffled = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(1))]
    more = torch.cat([tokens, tokens[:300] * 1.05])
    for other in (shuffled, more, tokens.half()):
        again = PCABasis.fit(other.float())
        assert (torch.cosine_similarity(again.components, first.components) > 0.99).all()
    # The rule itself: the cubes of the loadings sum to something positive.
    assert ((first.components**3).sum(1) > 0).all()


def test_projecting_first_equals_upsampling_all_channels():
    g = torch.Generator().manual_seed(2)
    features = torch.randn(24, 5, 7, generator=g)
    basis = PCABasis.fit(features.flatten(1).T)
    weights = torch.rand(35, 40 * 56, generator=g).softmax(0)  # any weights that sum to 1

    def up(values: torch.Tensor) -> torch.Tensor:
        return (values.flatten(1) @ weights).reshape(-1, 40, 56)

    torch.testing.assert_close(up(basis.apply(features)), basis.apply(up(features)))
    # The colours too: a level apart at most, where rounding falls the other way.
    first, after = basis.to_rgb(up(basis.apply(features))), basis.to_rgb(basis.apply(up(features)))
    assert np.abs(first.astype(int) - after.astype(int)).max() <= 1


def test_batches_of_maps():
    basis = PCABasis.fit(cloud())
    maps = torch.randn(2, 24, 3, 4)
    torch.testing.assert_close(basis.apply(maps)[1], basis.apply(maps[1]))


@pytest.mark.parametrize(
    ("tokens", "empty"),
    [
        (torch.full((50, 8), 3.7), 3),  # constant
        (torch.ones(1, 8), 3),  # one token
        (torch.arange(12.0).reshape(-1, 1).repeat(1, 8), 2),  # a line
        (torch.rand(9, 2, generator=torch.Generator().manual_seed(3)), 1),  # two channels
        (torch.zeros(4, 1), 3),
    ],
)
def test_rank_deficient_tokens(tokens, empty):
    basis = PCABasis.fit(tokens)
    assert (basis.components.abs().sum(1) == 0).sum() == empty
    rgb = basis.to_rgb(basis.apply(tokens.T[:, None]))
    assert rgb.shape == (1, len(tokens), 3)
    assert np.ptp(rgb) == 0 if empty == 3 else np.ptp(rgb, axis=1).max() > 100


def test_a_small_object_on_a_constant_ground_keeps_its_colour():
    tokens = torch.zeros(400, 6)
    tokens[:12] = torch.tensor([4.0, 1, 0, 0, 2, 0])
    basis = PCABasis.fit(tokens)
    rgb = basis.to_rgb(basis.apply(tokens.T[:, None]))[0].astype(int)
    assert np.abs(rgb[0] - rgb[-1]).max() > 100


def test_colours_rise_with_the_scores_and_level_off_outside_the_usual_range():
    basis = PCABasis.fit(cloud())
    middle, span = basis.middle, basis.high - basis.low
    places = torch.linspace(-2, 2, 81)
    for channel in range(3):
        scores = middle[:, None].repeat(1, 81)
        scores[channel] += places * span[channel]
        ramp = basis.to_rgb(scores[:, None])[0].astype(int)
        assert (np.diff(ramp[:, channel]) >= 0).all()
        assert (np.abs(ramp[40] - 127.5) < 1).all()
        inside, outside = (
            ramp[50, channel] - ramp[30, channel],
            ramp[80, channel] - ramp[70, channel],
        )
        assert inside > 150 and outside <= 1
    lost = basis.to_rgb(torch.full((3, 1, 1), torch.nan))
    assert (np.abs(lost - 127.5) < 1).all()


def test_a_range_with_most_tokens_at_one_end_uses_more_than_one_colour():
    g = torch.Generator().manual_seed(8)
    scores = torch.randn(2000, 1, generator=g)
    scores[::10] += 30  # a tenth lies far away
    axis = F.normalize(torch.randn(1, 12, generator=g), dim=1)
    basis = PCABasis.fit(scores @ axis + 0.01 * torch.randn(2000, 12, generator=g))
    rgb = basis.to_rgb(basis.apply((scores @ axis).T[:, None]))[0, :, 0].astype(int)
    most, few = rgb[1::10], rgb[::10]
    assert abs(np.median(most) - np.median(few)) > 100
    assert np.percentile(most, 95) - np.percentile(most, 5) > 20  # a linear scale leaves 12


def test_save_and_load(tmp_path):
    basis = PCABasis.fit(cloud(), metadata=META)
    path = tmp_path / "basis.safetensors"
    basis.save(path)
    again = PCABasis.load(path)
    assert again.metadata == META and again.fingerprint == basis.fingerprint
    torch.testing.assert_close(again.components, basis.components, rtol=0, atol=0)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    again.check(backbone="toy.v1", layer=11, channels=24)
    with pytest.raises(UsageError, match=r"toy\.v1 layer 11.*other\.v2 layer 11"):
        again.check(backbone="other.v2", layer=11, channels=24)
    with pytest.raises(UsageError, match="layer 5"):
        again.check(backbone="toy.v1", layer=5, channels=24)
    with pytest.raises(UsageError, match=r"24 channels.*gives 48"):
        again.check(backbone="toy.v1", layer=11, channels=48)


def test_files_that_are_no_basis(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(UsageError, match="no PCA basis at"):
        PCABasis.load(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UsageError, match="is not a PCA basis"):
        PCABasis.load(tmp_path / "text")
    save_file({"mean": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="is not a PCA basis"):
        PCABasis.load(tmp_path / "other.safetensors")
    with pytest.raises(OutputError, match="cannot write"):
        PCABasis.fit(cloud()).save(tmp_path / "no" / "such" / "folder.safetensors")


def test_arguments_that_are_no_tokens():
    for wrong in (torch.zeros(3), torch.zeros(0, 5), torch.zeros(4, 5, dtype=torch.long)):
        with pytest.raises(ShapeError, match=r"tokens \[N, C\]"):
            PCABasis.fit(wrong)
    with pytest.raises(ShapeError, match="none of the tokens is finite"):
        PCABasis.fit(torch.full((4, 5), torch.nan))
    with pytest.raises(ShapeError, match="for 24 channels"):
        PCABasis.fit(cloud()).apply(torch.zeros(8, 4, 4))


def test_sampled_tokens_are_spread_evenly():
    rows, columns = torch.meshgrid(torch.arange(30.0), torch.arange(40.0), indexing="ij")
    sample = sample_tokens(torch.stack([rows, columns]), 300)
    assert sample.shape == (300, 2) and len({tuple(t.tolist()) for t in sample}) == 300
    quarter = (sample[:, 0] < 15) & (sample[:, 1] < 20)
    assert 65 <= int(quarter.sum()) <= 85
    assert sample_tokens(torch.zeros(3, 2, 2), 99).shape == (4, 3)


# --- foreground -----------------------------------------------------------------------------------


def scene(c: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [c, 16, 20] of an object away from the border, and its mask."""
    g = torch.Generator().manual_seed(4)
    mask = torch.zeros(16, 20, dtype=torch.bool)
    mask[4:12, 6:15] = True
    ground, thing = torch.randn(2, c, generator=g)
    features = torch.where(mask, 3 * thing[:, None, None], 3 * ground[:, None, None])
    return features + 0.3 * torch.randn(c, 16, 20, generator=g), mask


@pytest.mark.parametrize("turned", [False, True])
def test_foreground_is_what_the_border_is_not(turned):
    features, mask = scene()
    features = -features if turned else features  # a sign must not decide
    score = Split.fit(features).apply(features)[0]
    assert ((score > 0) == mask).float().mean() > 0.99


def test_foreground_score_is_affine_so_it_may_be_upsampled():
    features, _ = scene()
    split = Split.fit(features)
    big = F.interpolate(features[None], (64, 80), mode="bilinear")[0]
    first = F.interpolate(split.apply(features)[None], (64, 80), mode="bilinear")[0]
    torch.testing.assert_close(first, split.apply(big), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 1, 1), (8, 5, 5)])
def test_what_cannot_be_divided_is_all_foreground(shape):
    features = torch.ones(shape)
    assert (Split.fit(features).apply(features) > 0).all()


def test_otsu_between_two_lumps():
    g = torch.Generator().manual_seed(5)
    values = torch.randn(590, generator=g) * 0.2
    values[500:] += 4
    cut, quality = otsu(values)
    assert 1 < cut < 3.2 and quality > 0.95
    assert otsu(torch.ones(5)) == (1.0, 0.0)
