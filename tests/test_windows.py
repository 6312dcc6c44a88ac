"""Pictures in windows: kernel weights equal to the whole's, blended features, bounded memory."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import Blocks, PatchMeans, draw
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import fmupsample
from fmupsample.errors import UsageError
from fmupsample.images import ImageSize, find_images
from fmupsample.jobs.extract import ExtractOptions, extract
from fmupsample.memory import available_memory, parse_memory
from fmupsample.pipeline import Pipeline
from fmupsample.upsamplers import ReSFU, ReSFUConfig, load_upsampler
from fmupsample.upsamplers.aligned import windows as upsampler_windows
from fmupsample.upsamplers.jbu import JointBilateral
from fmupsample.windows import (
    features_in_windows,
    overview_size,
    ramp,
    starts,
    window_side,
    with_coarse_part,
)


def small_resfu(channels: int = 6, **options: object) -> ReSFU:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        head = ReSFU(ReSFUConfig(channels, **options))
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    head.fingerprint = "small"
    return head.eval().requires_grad_(False)


@pytest.fixture
def small_windows(monkeypatch) -> None:
    monkeypatch.setattr(upsampler_windows, "_FEWEST", 24)
    monkeypatch.setattr("fmupsample.pipeline.maps._WHOLE_PIXELS", 1000)
    monkeypatch.setattr("fmupsample.pipeline.maps._WINDOW_PIXELS", 1500)
    monkeypatch.setattr("fmupsample.pipeline.maps._FEWEST_PIXELS", 100)


# -- the upsampler: exact -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"align": False},
        {"semantic": False},
        {"detail": False},
        {"kernel_size": 5},
        {"guided_radius": 5},
        {"similarity": "inner"},
        {"neighbours": "coarse"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("size", "grid"), [((112, 168), (8, 12)), ((113, 131), (8, 9)), ((100, 61), (7, 5))]
)
def test_resfu_in_windows_is_resfu(size, grid, options, small_windows) -> None:
    """Also at odd sizes (the half grid), ratios that are not whole, and in batches."""
    head = small_resfu(16, **options).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, *grid, generator=generator).double()
    picture = torch.randn(2, 3, *size, generator=generator).double()
    whole = head.kernels(x, picture, size)
    for pixels in (1500, 9000):
        bands = list(head.kernels_in_rows(x, picture, size, pixels))
        assert len(bands) > 1 or options.get("similarity") == "inner"
        torch.testing.assert_close(torch.cat(bands, 2), whole, rtol=0, atol=1e-11)


def test_guidance_of_another_size_and_bfloat16(small_windows) -> None:
    head = small_resfu(16)
    x, picture = torch.randn(1, 16, 6, 9), torch.randn(1, 3, 90, 120)
    for features, bound in ((x, 2e-5), (x.bfloat16(), 0.05)):
        whole = head.kernels(features, picture, (96, 144))
        parts = torch.cat(list(head.kernels_in_rows(features, picture, (96, 144), 4000)), 2)
        assert (whole - parts).abs().max() < bound


def test_joint_bilateral_in_windows() -> None:
    method = JointBilateral()
    x, picture = torch.randn(1, 4, 7, 5), torch.randn(1, 3, 100, 61)
    for size in ((100, 61), (110, 80)):
        whole = method.kernels(x, picture, size)
        bands = list(method.kernels_in_rows(x, picture, size, 500))
        assert len(bands) > 5
        torch.testing.assert_close(torch.cat(bands, 2), whole, rtol=1e-5, atol=1e-7)


@given(
    size=st.tuples(st.integers(1, 900), st.integers(1, 900)),
    pixels=st.integers(1, 300_000),
    reach=st.integers(0, 40),
)
def test_windows_hold_every_pixel_once(size, pixels, reach) -> None:
    seen = np.zeros(size, dtype=int)
    for band in upsampler_windows.split(size, pixels, reach):
        for window in band:
            seen[window.own] += 1
            for own, region, length in zip(window.own, window.region, size, strict=True):
                assert region.start <= max(0, own.start - reach) and region.start % 2 == 0
                assert min(length, own.stop + reach) <= region.stop <= length
                assert region.stop == length or region.stop % 2 == 0
    assert (seen == 1).all()


# -- through the pipeline -------------------------------------------------------------------------


def item_of(tmp_path: Path, pipeline: Pipeline, height: int = 96, width: int = 136):
    draw(tmp_path / "p.png", height, width)
    errors = []
    items = list(pipeline.items(find_images([tmp_path / "p.png"]), on_error=errors.append))
    assert not errors
    return items[0]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [None, (192, 272), (300, 410), (7, 9)])
@pytest.mark.parametrize("name", ["resfu", "jbu", "bilinear"])
def test_maps_in_windows_are_the_whole_maps(name, size, tmp_path, monkeypatch, request) -> None:
    backbone = PatchMeans()
    upsampler = small_resfu() if name == "resfu" else load_upsampler(backbone, name)
    monkeypatch.setattr("fmupsample.pipeline.sizes._DIRECT_PIXELS", 60_000)
    pipeline = Pipeline(backbone, upsampler, image_size=ImageSize(short=90), fit="pad")
    item = item_of(tmp_path, pipeline)
    assert item.frame.padded
    whole = pipeline.upsample(item, size), pipeline.kernels(item, size).weights
    request.getfixturevalue("small_windows")
    rows = list(pipeline.kernel_rows(item, size))
    assert len(rows) > 1 or name == "bilinear"
    close(pipeline.upsample(item, size), whole[0])
    close(pipeline.kernels(item, size).weights, whole[1])
    height, width = rows[0].shape[2], sum(r.shape[1] for r in rows)
    close(torch.cat(rows, 1), whole[1][0, :, :width, :height])
    few = pipeline.upsample(item, size, item.features[:2])
    close(few, whole[0][:2])


def test_upsamplers_with_a_way_of_their_own_still_work(tmp_path: Path, small_windows) -> None:
    pipeline = Pipeline(PatchMeans(), Blocks(), image_size=ImageSize(short=96))
    assert pipeline.upsample(item_of(tmp_path, pipeline)).shape == (6, 96, 136)


def test_compact_files_in_windows(tmp_path: Path, request) -> None:
    draw(tmp_path / "p.png", 96, 136)
    maps = []
    for n in range(2):
        pipeline = Pipeline(PatchMeans(), small_resfu(), image_size=ImageSize(short=96))
        options = ExtractOptions("compact", "fp32", weight_bits=32)
        report = extract(pipeline, find_images([tmp_path / "p.png"]), tmp_path / f"{n}", options)
        maps.append(fmupsample.open(tmp_path / f"{n}" / report.done[0]["output"]).full())
        request.getfixturevalue("small_windows")
    close(*maps)


def test_out_of_memory_halves_the_kernels_and_goes_on(tmp_path: Path, small_windows) -> None:
    head = small_resfu()
    pipeline = Pipeline(PatchMeans(), head, image_size=ImageSize(short=96))
    item = item_of(tmp_path, pipeline)
    expected = pipeline.upsample(item)
    asked, real = [], head.kernels_in_rows

    def short_of_memory(x, guidance, size, pixels):
        asked.append(pixels)
        for n, band in enumerate(real(x, guidance, size, pixels)):
            if pixels > 400 and n == 1:  # in the middle of a picture
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield band

    head.kernels_in_rows = short_of_memory
    close(pipeline.upsample(item), expected)
    assert asked == [1500, 750, 375]
    close(pipeline.upsample(item), expected)
    assert asked == [1500, 750, 375, 375]  # what was learnt is kept

    def hopeless(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    head.kernels_in_rows = hopeless
    with pytest.raises(torch.OutOfMemoryError):
        pipeline.upsample(item)


def test_max_memory_decides_what_is_made_at_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("fmupsample.pipeline.maps._FEWEST_PIXELS", 100)
    head = small_resfu()
    asked, real = [], head.kernels_in_rows
    head.kernels_in_rows = lambda *a: asked.append(a[-1]) or real(*a)
    for allowed, expected in ((None, []), (head.bytes_per_pixel * 2000, [2000])):
        pipeline = Pipeline(PatchMeans(), head, image_size=ImageSize(short=96), max_memory=allowed)
        pipeline.upsample(item_of(tmp_path, pipeline))
        assert asked == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4GB", 4 * 10**9), ("1.5 g", 1.5e9), ("500MiB", 5e8), (64 * 10**6, 64e6), ("2T", 2e12)],
)
def test_memory_words(text, expected) -> None:
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["", "much", "-1GB", "4GBs", "1e9", "63MB", "0"])
def test_memory_that_is_none(text) -> None:
    with pytest.raises(UsageError, match="memory"):
        parse_memory(text)


def test_available_memory_is_something() -> None:
    found = available_memory(torch.device("cpu"))
    assert found is None or 10**7 < found < 10**14


# -- the backbone: blended ------------------------------------------------------------------------


@given(
    cells=st.integers(1, 80),
    window=st.integers(1, 40),
    multiple=st.sampled_from([1, 8, 14]),
)
def test_windows_cover_the_axis_and_overlap(cells: int, window: int, multiple: int) -> None:
    length, side = cells * multiple, min(window, cells) * multiple
    found = starts(length, side, multiple)
    assert found[0] == 0 and found[-1] == length - side
    assert all(n % multiple == 0 for n in found)
    for a, b in pairwise(found):
        assert a < b
        if side > 4 * multiple:
            assert a + side - b >= side / 4


@given(n=st.integers(2, 30), data=st.data())
def test_ramps_of_neighbours_sum_to_one(n: int, data) -> None:
    overlap = data.draw(st.integers(1, n))
    falling, rising = ramp(n, 0, overlap), ramp(n, overlap, 0)
    torch.testing.assert_close(
        falling[n - overlap :] + rising[:overlap], torch.ones(overlap).double()
    )
    assert (ramp(n, 0, 0) == 1).all() and (falling > 0).all()


def test_a_local_backbone_sees_no_windows() -> None:
    """What depends on a cell's own pixels alone is the same in every window."""
    backbone = PatchMeans()
    image = torch.randn(3, 120, 200, generator=torch.Generator().manual_seed(0))
    for side in (16, 40, 104, 120):
        window = window_side((120, 200), side, (8, 8))
        found = features_in_windows(backbone, image, window, (8, 8), batch=3)
        torch.testing.assert_close(found, backbone(image[None])[0], rtol=1e-5, atol=1e-5)


def test_what_differs_between_windows_passes_smoothly() -> None:
    """Each window adds a constant of its own, as global attention would: no step remains."""
    backbone, count = PatchMeans(), iter(range(1000))

    def moody(images: Tensor) -> Tensor:
        return backbone(images) * 0 + next(count) % 2

    found = features_in_windows(moody, torch.zeros(3, 64, 480), (64, 160), (8, 8))
    assert found.min() == 0 and found.max() == 1
    assert found.diff(dim=2).abs().max() < 0.35  # overlaps of five cells: a fifth, and a little
    assert found.diff(dim=1).abs().max() < 1e-6


def test_the_coarse_part_is_that_of_the_whole_picture() -> None:
    """A tone of its own in each window is gone; detail stays."""
    g = torch.Generator().manual_seed(0)
    detail = torch.randn(2, 48, 64, generator=g)
    detail -= F.interpolate(F.adaptive_avg_pool2d(detail[None], (24, 32)), (48, 64))[0]
    trend = torch.linspace(0, 5, 64).expand(2, 48, 64)
    tones = F.interpolate(torch.randn(1, 2, 3, 4, generator=g), (48, 64), mode="bilinear")[0]
    overview = F.interpolate(trend[None], (12, 16), mode="area")[0]
    size, window = (48 * 8, 64 * 8), (16 * 8, 16 * 8)
    found = with_coarse_part(detail + trend + tones, overview, size, window)
    assert (found - detail - trend).abs().mean() < 0.1 * tones.abs().mean()
    for shape in ((48, 64), (10, 100), (100, 3), (1, 1)):
        pixels = tuple(n * 8 for n in shape)
        side = window_side(pixels, 40, (8, 8))
        small = overview_size(pixels, side, (8, 8))
        assert all(8 <= n <= s and n % 8 == 0 for n, s in zip(small, side, strict=True))
        few = torch.zeros(2, *(n // 8 for n in small))
        assert with_coarse_part(torch.ones(2, *shape), few, pixels, side).abs().max() < 1e-5


def test_large_canvases_are_windowed_and_the_manifest_says_so(tmp_path, monkeypatch) -> None:
    draw(tmp_path / "p.png", 96, 136)
    pictures = find_images([tmp_path / "p.png"])

    def record(name: str, **more) -> dict:
        pipeline = Pipeline(PatchMeans(), Blocks(), image_size=ImageSize(short=96), **more)
        return extract(pipeline, pictures, tmp_path / name).done[0]

    whole = record("whole")
    assert "window" not in whole and "window" not in whole["options"]
    asked = record("asked", window=60)
    assert asked["window"] == [56, 56] and asked["options"]["window"] == 60
    with pytest.raises(UsageError, match=r"window None \(now 60\)"):
        extract(
            Pipeline(PatchMeans(), Blocks(), image_size=ImageSize(short=96), window=60),
            pictures,
            tmp_path / "whole",
        )
    monkeypatch.setattr("fmupsample.pipeline.features._BACKBONE_PIXELS", 96 * 136 - 1)
    monkeypatch.setattr("fmupsample.pipeline.features._BACKBONE_WINDOW", 64)
    automatic = record("automatic")
    assert automatic["window"] == [64, 64] and "window" not in automatic["options"]
    with pytest.raises(UsageError, match="window of 0"):
        Pipeline(PatchMeans(), window=0)


def test_out_of_memory_in_the_backbone_takes_windows(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("fmupsample.pipeline.features._LEAST_WINDOW", 16)

    class Small(PatchMeans):
        most = 48 * 48

        def forward(self, images: Tensor) -> Tensor:
            if images.shape[2] * images.shape[3] > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(images)

    draw(tmp_path / "p.png", 96, 136)
    pictures = find_images([tmp_path / "p.png"])
    size = ImageSize(short=96)
    expected = item_of(tmp_path, Pipeline(PatchMeans(), image_size=size)).features
    item = item_of(tmp_path, Pipeline(Small(), image_size=size))
    assert item.window == (32, 32)
    torch.testing.assert_close(item.features, expected, rtol=0, atol=0.2)
    Small.most = 1
    errors = []
    pipeline = Pipeline(Small(), image_size=size)
    list(pipeline.items(pictures, on_error=lambda source, error: errors.append(str(error))))
    assert "use a smaller --image-size" in errors[0]


def test_no_grid_is_seen_in_a_large_picture(tmp_path: Path, tiny_backbone) -> None:
    """With a ViT no line stands out. (How blending hides a seam is tested with a backbone that has
    nothing but seams, above; here the noise of a random network would hide small ones.)"""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((512, 384), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "p.png")
    found = []
    for window in (None, 192):
        pipeline = Pipeline(tiny_backbone, image_size=ImageSize.parse("native"), window=window)
        items = list(pipeline.items(find_images([tmp_path / "p.png"]), on_error=lambda *e: None))
        found.append(items[0].features)  # [64, 24, 32]
    assert items[0].window == (192, 192)
    assert (found[0] - found[1]).norm() < 0.7 * (found[0] - found[0].mean((1, 2), True)).norm()
    # Lines where what the windows changed jumps would be the grid.
    for dim in (1, 2):
        jumps = (found[1] - found[0]).diff(dim=dim).square().sum(0).mean(2 - dim).sqrt()
        assert jumps.max() < 1.5 * jumps.median()
