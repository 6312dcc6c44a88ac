"""The terms of the objective against what they are defined to be, pixel by pixel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_training import HEAD, options
from torch import nn
from toy import ToyNonlinear, ToyUpsampler

from fmupsample.training.clusters import Clusters, sample_pixels
from fmupsample.training.objective import (
    TERMS,
    Batch,
    Objective,
    Scaling,
    at_centres,
    average,
    means_of_regions,
    rarity,
    split_into_blocks,
)
from fmupsample.upsamplers import Bilinear, ReSFU, ReSFUConfig

B, C, H, CELLS = 2, 6, 24, 3
ALL = dict.fromkeys(TERMS, 1.0)


@pytest.fixture
def batch() -> Batch:
    g = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    regions = torch.randint(0, 5, (B, H, H), generator=g)
    regions[1] += 5
    _, regions = regions.unique(return_inverse=True)
    labels = torch.randint(0, 3, (B, H, H), generator=g)
    labels[0, :10] = 255
    return Batch(
        image=noise(B, 3, H, H), low=noise(B, C, CELLS, CELLS) * 3 + 1,
        fine=noise(B, C, 2 * CELLS, 2 * CELLS) * 3 + 1, regions=regions,
        varied=noise(B, 3, H, H), labels=labels, phase=(1, 0),
        shifted=noise(B, C, CELLS, CELLS) * 3 + 1, shifts=[(3, -2), (0, -4)],
    )  # fmt: skip


@pytest.fixture
def scaling(batch: Batch) -> Scaling:
    return Scaling.fit(batch.low, "standard")


@pytest.fixture
def clusters() -> Clusters:
    g = torch.Generator().manual_seed(4)
    shapes = ((5, C), (5, C), (5,))
    return Clusters(*(torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes))


def distance(predicted: torch.Tensor, target: torch.Tensor, cosine: float, mse: float) -> float:
    """Of two lists of vectors ``[N, C]``, literally."""
    total = 0.0
    for p, t in zip(predicted, target, strict=True):
        total += cosine * (1 - float(p @ t) / float(p.norm() * t.norm()))
        total += mse * float(((p - t) ** 2).mean())
    return total / len(predicted)


def vectors(maps: torch.Tensor) -> torch.Tensor:
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


@pytest.mark.parametrize("upsampler", [ToyUpsampler(), ToyNonlinear()], ids=lambda u: u.name)
@pytest.mark.parametrize("sliced", [False, True])
def test_terms_are_what_they_are_defined_to_be(batch, scaling, clusters, upsampler, sliced) -> None:
    share = 0.7 if sliced else 0.0
    # Masks look at kernel weights, which a nonlinear upsampler has none of.
    terms = [name for name in TERMS if name != "masks" or upsampler.linear_in_value]
    config = options(
        objective=dict.fromkeys(terms, 1.0),
        cosine=0.7,
        mse=0.4,
        region_share=0.6,
        pixel_stride=2,
        cluster_share=share,
    )
    objective = Objective(config, scaling)
    objective.clusters = clusters
    if sliced:
        objective.map_bytes = 2 * B * H * H * 8  # two channels at a time
    torch.manual_seed(0)
    probe = nn.Conv2d(C, 3, 1).double().requires_grad_(False)
    with torch.no_grad():
        found = objective(upsampler, batch, probe)
    assert list(found) == terms

    up = scaling(upsampler(batch.low, batch.image))
    low, fine = scaling(batch.low), scaling(batch.fine)
    size = H // CELLS

    def check(name: str, predicted: torch.Tensor, target: torch.Tensor) -> None:
        expected = distance(vectors(predicted), vectors(target), 0.7, 0.4)
        assert float(found[name]) == pytest.approx(expected, abs=1e-9), name

    check("crops", F.avg_pool2d(up, size // 2), fine)
    check("area", F.avg_pool2d(up, size), low)
    middle = slice(size // 2 - 1, size // 2 + 1)
    cells = up.unfold(2, size, size).unfold(3, size, size)
    check("preserve", cells[..., middle, middle].mean((4, 5)), low)
    seen = scaling(batch.shifted)
    means, targets = [], []
    for b, (down, right) in enumerate(batch.shifts):
        for i in range(CELLS):
            for j in range(CELLS):
                y, x = i * size + down, j * size + right
                if min(y, x) >= 0 and max(y, x) + size <= H and (down or i < CELLS - 1):
                    means.append(up[b, :, y : y + size, x : x + size].mean((1, 2)))
                    targets.append(seen[b, :, i, j])
    assert len(means) == B * (CELLS - 1) ** 2
    expected = distance(torch.stack(means), torch.stack(targets), 0.7, 0.4)
    assert float(found["shifts"]) == pytest.approx(expected, abs=1e-9)
    varied = scaling(upsampler(batch.low, batch.varied))
    check("augment", varied[:, :, 1::2, ::2], up[:, :, 1::2, ::2])
    both = 0.5 * sum(F.interpolate(x, size=(H, H), mode="bilinear") for x in (low, fine))
    target = both.clone()
    for region in batch.regions.unique():
        b, y, x = torch.nonzero(batch.regions == region, as_tuple=True)
        mean = both[b, :, y, x].mean(0)
        target[b, :, y, x] = 0.6 * mean + 0.4 * both[b, :, y, x]
    # The shares of cells in regions are summed in float32.
    expected = distance(vectors(up[:, :, 1::2, ::2]), vectors(target[:, :, 1::2, ::2]), 0.7, 0.4)
    assert float(found["regions"]) == pytest.approx(expected, abs=1e-6)
    sharp = vectors(F.interpolate(fine, size=(H, H), mode="bilinear")[:, :, 1::2, ::2])
    own = batch.regions[:, 1::2, ::2].flatten()
    means = torch.stack([sharp[own == number].mean(0) for number in own])
    sharp = share * means + (1 - share) * sharp
    nearest = torch.cdist(sharp, clusters.centres).argmin(1)
    logits = vectors(up[:, :, 1::2, ::2]) @ clusters.weight.T + clusters.bias
    expected = F.cross_entropy(logits, nearest)
    assert float(found["clusters"]) == pytest.approx(float(expected), abs=1e-9)
    each = [
        F.cross_entropy(probe(up)[b : b + 1], batch.labels[b : b + 1], ignore_index=255)
        for b in range(B)
    ]
    assert float(found["task"]) == pytest.approx(float(sum(each)) / B, abs=1e-9)
    if "masks" in terms:
        one_hot = F.one_hot(batch.labels.where(batch.labels != 255, 3), 4).double()
        shares = F.avg_pool2d(one_hot.permute(0, 3, 1, 2)[:, :3], size)
        taken = upsampler(shares, batch.image)  # of each label in a pixel's weights
        losses = [
            -torch.log(taken[b, batch.labels[b, y, x], y, x])
            for b, y, x in torch.nonzero(batch.labels != 255).tolist()
        ]
        assert float(found["masks"]) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-6)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_small_clusters_count_as_much_as_is_asked(exponent) -> None:
    members = torch.tensor([[[3, 3, 3, 0], [3, 5, 5, 3]], [[1, 1, 1, 1], [1, 1, 1, 1]]])
    weights = rarity(members, exponent)
    assert weights[1].eq(1).all()
    assert weights[0].mean() == pytest.approx(1)
    # Five pixels of 3, two of 5, one of 0: what each cluster weighs in all.
    totals = [float(weights[0][members[0] == number].sum()) for number in (3, 5, 0)]
    assert totals[0] / totals[2] == pytest.approx(5 ** (1 - exponent))
    assert totals[1] / totals[2] == pytest.approx(2 ** (1 - exponent))


def test_clusters_of_three_groups_of_pixels() -> None:
    """Groups far apart are found, and told from low-resolution features that know them."""
    g = torch.Generator().manual_seed(0)
    group = torch.randint(0, 3, (600,), generator=g)
    fine = 10 * torch.eye(3, 4)[group] + torch.randn(600, 4, generator=g)
    low = torch.eye(3)[group] @ torch.randn(3, C, generator=g)
    found = Clusters.fit(fine, low, 3, seed=1)
    members = torch.cdist(fine, found.centres).argmin(1)
    pairs = set(zip(group.tolist(), members.tolist(), strict=True))
    assert len(pairs) == len({m for _, m in pairs}) == 3
    told = found.logits(low.T[None, :, :, None])[0, :, :, 0].argmax(0)
    assert torch.equal(told, members)
    again = Clusters.fit(fine, low, 3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(found.tensors(), again.tensors(), strict=True))
    assert len(Clusters.fit(fine[:25], low[:25], 100).centres) == 2


def test_pixels_for_clusters_are_those_of_the_maps() -> None:
    g = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    low = torch.stack([y, x])
    fine, cells = sample_pixels(low, low, (20, 30), 200, g)
    # Features that are the coordinates tell where the pixels are: the same cell, interpolated.
    assert torch.equal(cells, fine.round()) and len(cells.unique(dim=0)) == 24


def test_gradients_reach_every_parameter_and_do_not_depend_on_slices(
    batch, scaling, clusters
) -> None:
    torch.manual_seed(0)
    head = ReSFU(ReSFUConfig(channels=C, **HEAD)).double()
    probe = nn.Conv2d(C, 3, 1).double()
    gradients = []
    for map_bytes in (None, 1):
        objective = Objective(options(objective=ALL), scaling)
        objective.map_bytes, objective.clusters = map_bytes, clusters
        head.zero_grad(set_to_none=True)
        objective.total(objective(head, batch, probe)).backward()
        gradients.append({name: p.grad.clone() for name, p in head.named_parameters()})
    for name, gradient in gradients[0].items():
        # Softmax does not see what is added to all scores alike, nor norms a bias before them.
        assert gradient.abs().max() > 0 or name.endswith("bias"), name
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-12)


def test_gradient_of_the_distance(batch, scaling) -> None:
    """Against autograd's, by way of PyTorch's own cosine similarity."""
    config = options(objective={"area": 1.0}, cosine=0.7, mse=0.4)
    torch.manual_seed(1)
    head = ReSFU(ReSFUConfig(channels=C, **HEAD)).double()
    Objective(config, scaling)(head, batch)["area"].backward()
    mine = head.query.weight.grad.clone()
    head.zero_grad()
    up = average(head.reassemble(head.kernels(batch.low, batch.image), scaling(batch.low)), (3, 3))
    low = scaling(batch.low)
    loss = 0.7 * (1 - F.cosine_similarity(up, low)) + 0.4 * (up - low).square().mean(1)
    loss.mean().backward()
    torch.testing.assert_close(mine, head.query.weight.grad, rtol=1e-8, atol=1e-12)


def test_bilinear_upsampling_keeps_the_centres_of_cells(batch, scaling) -> None:
    objective = Objective(options(objective={"preserve": 1.0, "augment": 1.0}, cosine=0), scaling)
    found = objective(Bilinear(), batch)
    assert float(found["augment"]) == 0
    odd = Batch(image=torch.zeros(B, 3, 15, 15), low=batch.low)
    objective = Objective(options(objective={"preserve": 1.0}, cosine=0), scaling)
    assert float(objective(Bilinear(), odd)["preserve"]) < 1e-12
    full = torch.arange(15.0).expand(1, 1, 15, 15)
    assert at_centres(full, (3, 3))[0, 0, 0].tolist() == [2.0, 7.0, 12.0]


def test_scaling() -> None:
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64) * 7 + 2
    x[:, 2] = 4.0  # a channel that never varies
    y = Scaling.fit(x, "standard")(x)
    torch.testing.assert_close(y[:, :2].mean((0, 2, 3)), torch.zeros(2).double())
    torch.testing.assert_close(y[:, :2].square().mean((0, 2, 3)), torch.ones(2).double())
    assert float(y[:, 2].abs().max()) < 1e-9
    y = Scaling.fit(x, "minmax")(x)
    assert float(y[:, 0].min()) == 0 and float(y[:, 0].max()) == pytest.approx(1)
    assert torch.equal(Scaling.fit(x, "none")(x), x)


def test_blocks_cut_regions_at_each_pictures_own_offset() -> None:
    regions = torch.zeros(2, 8, 8, dtype=torch.int32)
    blocks = split_into_blocks(regions, 4, torch.tensor([[0, 0], [2, 1]]))
    assert blocks[0, 0].tolist() == [0] * 4 + [1] * 4
    first = int(blocks[0].max()) + 1
    assert blocks[1, 0].tolist() == [first] * 3 + [first + 1] * 4 + [first + 2]
    assert blocks[1, :, 0].tolist() == [first] * 2 + [first + 3] * 4 + [first + 6] * 2
    assert sorted(blocks.unique().tolist()) == list(range(int(blocks.max()) + 1))


def test_means_of_regions_of_low_features_alone(batch) -> None:
    means = means_of_regions(batch.regions, batch.low, None)
    full = F.interpolate(batch.low, size=(H, H), mode="bilinear")
    b, y, x = torch.nonzero(batch.regions == 7, as_tuple=True)
    torch.testing.assert_close(means[7], full[b, :, y, x].mean(0), rtol=1e-5, atol=1e-5)
