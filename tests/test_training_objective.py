"""The terms of the objective against what they are defined to be, pixel by pixel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_training import HEAD, options
from toy import ToyNonlinear, ToyUpsampler

from fmupsample.training.clusters import Clusters, sample_pixels
from fmupsample.training.config import TERMS
from fmupsample.training.objective import Batch, Objective, Scaling
from fmupsample.upsamplers import ReSFU, ReSFUConfig

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
        fine=noise(B, C, 2 * CELLS, 2 * CELLS) * 3 + 1, regions=regions, labels=labels,
        phase=(1, 0),
    )  # fmt: skip


@pytest.fixture
def scaling(batch: Batch) -> Scaling:
    return Scaling.fit(batch.low)


@pytest.fixture
def clusters() -> Clusters:
    g = torch.Generator().manual_seed(4)
    shapes = ((5, C), (5, C), (5,))
    return Clusters(*(torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes))


def distance(predicted: torch.Tensor, target: torch.Tensor) -> float:
    """Of two lists of vectors ``[N, C]``, literally."""
    total = 0.0
    for p, t in zip(predicted, target, strict=True):
        total += 1 - float(p @ t) / float(p.norm() * t.norm())
        total += 0.5 * float(((p - t) ** 2).mean())
    return total / len(predicted)


def vectors(maps: torch.Tensor) -> torch.Tensor:
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


@pytest.mark.parametrize("upsampler", [ToyUpsampler(), ToyNonlinear()], ids=lambda u: u.name)
@pytest.mark.parametrize("sliced", [False, True])
def test_terms_are_what_they_are_defined_to_be(batch, scaling, clusters, upsampler, sliced) -> None:
    share = 0.7 if sliced else 0.0
    # Masks look at kernel weights, which a nonlinear upsampler has none of.
    terms = [name for name in TERMS if name != "masks" or upsampler.linear_in_value]
    config = options(objective=dict.fromkeys(terms, 1.0), pixel_stride=2, cluster_share=share)
    objective = Objective(config, scaling)
    objective.clusters = clusters
    if sliced:
        objective.map_bytes = 2 * B * H * H * 8  # two channels at a time
    with torch.no_grad():
        found = objective(upsampler, batch)
    assert list(found) == terms

    up = scaling(upsampler(batch.low, batch.image))
    fine = scaling(batch.fine)
    size = H // CELLS
    expected = distance(vectors(F.avg_pool2d(up, size // 2)), vectors(fine))
    assert float(found["crops"]) == pytest.approx(expected, abs=1e-9)
    sharp = vectors(F.interpolate(fine, size=(H, H), mode="bilinear")[:, :, 1::2, ::2])
    own = batch.regions[:, 1::2, ::2].flatten()
    means = torch.stack([sharp[own == number].mean(0) for number in own])
    sharp = share * means + (1 - share) * sharp
    nearest = torch.cdist(sharp, clusters.centres).argmin(1)
    logits = vectors(up[:, :, 1::2, ::2]) @ clusters.weight.T + clusters.bias
    expected = F.cross_entropy(logits, nearest)
    assert float(found["clusters"]) == pytest.approx(float(expected), abs=1e-9)
    if "masks" in terms:
        one_hot = F.one_hot(batch.labels.where(batch.labels != 255, 3), 4).double()
        shares = F.avg_pool2d(one_hot.permute(0, 3, 1, 2)[:, :3], size)
        taken = upsampler(shares, batch.image)  # of each label in a pixel's weights
        losses = [
            -torch.log(taken[b, batch.labels[b, y, x], y, x])
            for b, y, x in torch.nonzero(batch.labels != 255).tolist()
        ]
        assert float(found["masks"]) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-6)


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
    gradients = []
    for map_bytes in (None, 1):
        objective = Objective(options(objective=ALL), scaling)
        objective.map_bytes, objective.clusters = map_bytes, clusters
        head.zero_grad(set_to_none=True)
        objective.total(objective(head, batch)).backward()
        gradients.append({name: p.grad.clone() for name, p in head.named_parameters()})
    for name, gradient in gradients[0].items():
        # Softmax does not see what is added to all scores alike, nor norms a bias before them.
        assert gradient.abs().max() > 0 or name.endswith("bias"), name
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-12)


def test_scaling() -> None:
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64) * 7 + 2
    x[:, 2] = 4.0  # a channel that never varies
    y = Scaling.fit(x)(x)
    torch.testing.assert_close(y[:, :2].mean((0, 2, 3)), torch.zeros(2).double())
    torch.testing.assert_close(y[:, :2].square().mean((0, 2, 3)), torch.ones(2).double())
    assert float(y[:, 2].abs().max()) < 1e-9
