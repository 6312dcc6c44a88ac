"""Maps that are made part by part: the same numbers as of the whole, which is never there."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import Blocks, PatchMeans, draw
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fmupsample.images import ImageSize, find_images
from fmupsample.images.prepare import normalise, normalise_part
from fmupsample.jobs.extract import ExtractOptions, extract
from fmupsample.layers.parts import InParts, cell_means, in_parts
from fmupsample.pipeline import Pipeline
from fmupsample.upsamplers import (
    BilateralCells,
    BilateralCellsConfig,
    ReSFU,
    ReSFUConfig,
    load_upsampler,
)
from fmupsample.upsamplers.aligned import windows as upsampler_windows
from fmupsample.upsamplers.bilateral import projection
from fmupsample.upsamplers.bilateral.windows import _cell_shares
from fmupsample.upsamplers.jbu import JointBilateral
from fmupsample.windows import overview_of


class Watched:
    """A map in parts that notes how many pixels are read at a time."""

    def __init__(self, size: tuple[int, int]) -> None:
        g = torch.Generator().manual_seed(1)
        self.source = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, generator=g)
        self.most = 0
        self.map = InParts(self.source, self.make)

    def make(self, part: Tensor) -> Tensor:
        self.most = max(self.most, prod(part.shape[-2:]))
        return part.float() / 60 - 2


def test_parts_read_like_a_tensor() -> None:
    whole = torch.randn(3, 8, 9)
    doubled = in_parts(whole).then(lambda part: 2 * part.double(), torch.float64)
    assert doubled.shape == whole.shape and doubled.like.dtype == torch.float64
    assert torch.equal(doubled[:, 2:5, 1:], 2 * whole.double()[:, 2:5, 1:])
    assert torch.equal(doubled.unsqueeze(0).to(torch.float32)[...], 2 * whole[None])
    assert in_parts(doubled) is doubled


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    cells=st.tuples(st.integers(1, 12), st.integers(1, 12)),
)
def test_means_of_cells_are_those_of_the_whole(size, cells) -> None:
    """Also where cells share pixels; and a row of cells is all that is read."""
    watched = Watched(size)
    expected = F.adaptive_avg_pool2d(watched.map[...], cells)
    watched.most = 0
    torch.testing.assert_close(cell_means(watched.map, cells), expected)
    assert watched.most <= (-(-size[0] // cells[0]) + 1) * size[1]


@given(
    cells=st.integers(1, 20), more=st.integers(0, 60), cuts=st.lists(st.integers(0, 80), max_size=3)
)
def test_shares_of_parts_sum_to_the_mean(cells, more, cuts) -> None:
    pixels = cells + more
    x = torch.randn(pixels, dtype=torch.float64)
    found = torch.zeros(cells, dtype=torch.float64)
    bounds = sorted({0, pixels, *(c for c in cuts if c < pixels)})
    for first, last in pairwise(bounds):
        rows, shares = _cell_shares(cells, pixels, slice(first, last))
        found[rows] += shares @ x[first:last]
    expected = F.adaptive_avg_pool1d(x[None], cells)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(144, 200), (131, 113)])
@pytest.mark.parametrize("name", ["resfu", "bilateral-cells", "jbu"])
def test_kernels_never_read_the_whole(name, size, monkeypatch) -> None:
    monkeypatch.setattr(upsampler_windows, "_FEWEST", 24)
    torch.manual_seed(3)
    head = {
        "jbu": JointBilateral,
        "resfu": lambda: ReSFU(ReSFUConfig(6, guided_radius=2)),
        "bilateral-cells": lambda: BilateralCells(BilateralCellsConfig(guided_radius=2)),
    }[name]()
    head.use_with((0.5, 0.4, 0.3), (0.3, 0.2, 0.1))
    head.eval()
    x, watched = torch.randn(1, 6, 12, 11), Watched(size)
    whole = head.kernels(x, watched.map[...], size)
    watched.most = 0
    bands = list(head.kernels_in_rows(x, watched.map, size, 1500))
    assert len(bands) > 2
    assert 0 < watched.most < prod(size) / 2
    torch.testing.assert_close(torch.cat(bands, 2), whole.detach(), rtol=1e-4, atol=2e-5)
    for band in head.kernels_in_rows(x, watched.map, size, 1500):
        assert not band.requires_grad
        kept = weakref.ref(band)
        del band
        assert kept() is None  # so that there is room for the next one
    other = (size[0] + 9, size[1] + 4)  # resized, for which the whole is needed
    bands = torch.cat(list(head.kernels_in_rows(x, watched.map, other, 1500)), 2)
    torch.testing.assert_close(
        bands, head.kernels(x, watched.map[...], other).detach(), rtol=1e-4, atol=2e-5
    )


def test_the_overview_is_that_of_the_whole(monkeypatch) -> None:
    monkeypatch.setattr("fmupsample.windows._OVERVIEW_ROWS", 13)
    watched = Watched((120, 90))
    expected = F.interpolate(
        watched.map[...], (40, 24), mode="bicubic", align_corners=False, antialias=True
    )[0]
    watched.most = 0
    found = overview_of(InParts(watched.source[0], watched.make), (40, 24))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert watched.most == 13 * 90


def test_a_part_of_a_canvas_is_normalised_like_the_whole() -> None:
    canvas = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    values = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    whole = normalise(canvas, *values)
    pixels = torch.from_numpy(canvas).permute(2, 0, 1)
    part = normalise_part(pixels[:, 3:9, 5:], *values)
    assert torch.equal(part, whole[:, 3:9, 5:]) and part.is_contiguous()
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in values)
    expected = (torch.from_numpy(canvas.transpose(2, 0, 1) / 255.0) - mean) / std
    torch.testing.assert_close(whole.double(), expected, rtol=0, atol=1e-6)


def test_of_a_canvas_in_windows_only_its_bytes_are_kept(tmp_path: Path, monkeypatch) -> None:
    draw(tmp_path / "p.png", 96, 136)
    (source,) = find_images([tmp_path / "p.png"])
    backbone, sizes = PatchMeans(), []
    upsampler = load_upsampler(backbone, "jbu")

    def watched(pixels: Tensor, **values) -> Tensor:
        sizes.append(prod(pixels.shape[-2:]))
        return normalise_part(pixels, **values)

    monkeypatch.setattr("fmupsample.pipeline.features.normalise_part", watched)
    monkeypatch.setattr("fmupsample.pipeline.maps._WHOLE_PIXELS", 1000)
    monkeypatch.setattr("fmupsample.pipeline.maps._WINDOW_PIXELS", 1500)
    monkeypatch.setattr("fmupsample.windows._OVERVIEW_ROWS", 10)
    pipeline = Pipeline(backbone, upsampler, image_size=ImageSize(short=96), window=40)
    report = extract(pipeline, [source], tmp_path / "out", ExtractOptions("compact"))
    assert report.done[0]["window"] == [40, 40]
    assert 0 < max(sizes) <= 1600
    (item,) = pipeline.items([source], on_error=lambda *error: pytest.fail(str(error)))
    assert isinstance(item.guidance, InParts)
    kept = item.guidance._source
    assert kept.dtype == torch.uint8 and np.shares_memory(kept.numpy(), item.canvas)

    assert torch.equal(item.image, normalise(item.canvas, backbone.mean, backbone.std))


def test_one_band_of_kernel_weights_is_there_at_a_time(tmp_path: Path, monkeypatch) -> None:
    class Bands(Blocks):
        neighbours, kernel_size = "coarse", 1

        def kernels_in_rows(self, x, guidance, size, pixels) -> Iterator[Tensor]:
            last: weakref.ref | None = None
            for _ in range(size[0] // 8):
                assert last is None or last() is None
                band = x.new_ones(1, 1, 8, size[1])
                last = weakref.ref(band)
                yield band
                del band

    draw(tmp_path / "p.png", 96, 136)
    sources = find_images([tmp_path / "p.png"])
    monkeypatch.setattr("fmupsample.pipeline.maps._WHOLE_PIXELS", 1000)
    pipeline = Pipeline(PatchMeans(), Bands(), image_size=ImageSize(short=96))
    (item,) = pipeline.items(sources, on_error=lambda *error: pytest.fail(str(error)))
    assert pipeline.upsample(item).shape == (6, 96, 136)


def test_large_features_are_projected_some_channels_at_a_time(monkeypatch) -> None:
    x, weight = torch.randn(2, 50, 6, 7).double(), torch.randn(8, 50).double()
    whole = projection.project(x, weight)
    monkeypatch.setattr(projection, "_CHUNK_BYTES", 8 * 2 * 42 * 7)  # seven channels
    torch.testing.assert_close(projection.project(x, weight), whole, rtol=0, atol=1e-12)
