"""Panels, tiles, heat maps, sheets: geometry and pixels, and the exactness of what they show."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toy import ToyUpsampler

from fmupsample.draw import (
    Entry,
    Tile,
    blocks,
    colour_bar,
    darken,
    draw_panel,
    draw_sheet,
    grey,
    heat_colours,
    mark_point,
    overlay,
    tile_size,
)
from fmupsample.draw.contact import justify
from fmupsample.draw.panel import columns_for
from fmupsample.draw.similarity import similarity_maps
from fmupsample.draw.text import fit, plain, text_width
from fmupsample.errors import ShapeError

RED, GREEN, BLUE, GOLD = (200, 30, 40), (20, 160, 60), (30, 60, 200), (220, 180, 20)


def flat(colour, height=60, width=90) -> np.ndarray:
    return np.full((height, width, 3), colour, dtype=np.uint8)


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((448, 672), (448, 672)),  # as it is
        ((224, 224), (448, 448)),  # enlarged
        ((1, 1), (448, 448)),
        ((6000, 8000), (640, 853)),  # reduced
        ((448, 4480), (160, 1600)),  # a panorama: the long side decides
        ((4480, 448), (1600, 160)),
        ((1, 16000), (1, 1600)),
    ],
)
def test_tile_size(size, expected):
    assert tile_size(*size) == expected


def test_blocks_are_flat_and_exactly_where_their_cells_lie():
    cells = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(blocks(cells, (4, 6)), np.repeat(np.repeat(cells, 2, 0), 2, 1))
    # 7 columns for 3 cells: pixel centres decide, ties to none.
    expected = [math.floor((i + 0.5) * 3 / 7) for i in range(7)]
    assert blocks(cells, (2, 7))[0].tolist() == expected
    # Half of the canvas is padding: only the cells under the picture are drawn.
    part = blocks(cells, (8, 8), placed=(8, 12), canvas=(16, 24))
    assert set(part.ravel()) == {0, 1} and (part[:, :5] == 0).all() and (part[:, 6:] == 1).all()


# --- panels ---------------------------------------------------------------------------------------


def test_panel_holds_its_tiles_unchanged_where_it_says():
    rng = np.random.default_rng(0)
    tiles = [
        Tile(name, rng.integers(0, 255, (80, 120, 3), dtype=np.uint8))
        for name in ("Photograph", "Features", "Bilinear", "ReSFU")
    ]
    panel = draw_panel(tiles, caption="some/where/cat.jpg", note="toy")
    for tile, (x, y, width, height) in zip(tiles, panel.boxes, strict=True):
        assert (height, width) == (80, 120)
        np.testing.assert_array_equal(panel.pixels[y : y + height, x : x + width], tile.pixels)
    # Nothing but paper in the outermost pixels, and boxes that do not touch.
    edge = np.concatenate([panel.pixels[0], panel.pixels[-1], panel.pixels[:, 0]])
    assert (edge == 255).all()
    lefts = sorted({x for x, *_ in panel.boxes})
    assert all(b - a > 120 for a, b in pairwise(lefts))


def test_labels_stand_above_their_tiles_and_the_caption_below():
    tiles = [Tile("Photograph", flat(RED, 200, 200)), Tile("", flat(GREEN, 200, 200))]
    panel = draw_panel(tiles, columns=2)
    (x, y, width, _), (other, *_) = panel.boxes
    assert (panel.pixels[:y, x : x + width] < 128).any()  # ink above the first
    assert (panel.pixels[:y, other : other + width] == 255).all()  # none above the second
    below = panel.pixels[y + 200 :]
    assert (below == 255).all()
    with_caption = draw_panel(tiles, columns=2, caption="name").pixels
    assert with_caption.shape[0] > panel.pixels.shape[0]
    assert (with_caption[y + 200 :] < 128).any()


@pytest.mark.parametrize(
    ("height", "width", "columns"),
    [(448, 448, 4), (672, 448, 4), (448, 672, 2), (448, 597, 2), (160, 1600, 1), (1600, 160, 4)],
)
def test_tiles_are_arranged_by_their_shape(height, width, columns):
    assert columns_for(4, height, width) == columns


@pytest.mark.parametrize("shape", [(1, 1), (4, 300), (300, 4), (30, 30)])
def test_panels_of_tiny_and_thin_tiles(shape):
    tiles = [Tile(f"A long label {n}", flat(RED, *shape), "and a note") for n in range(4)]
    panel = draw_panel(
        tiles, caption="x" * 300, note="y" * 300, footer=colour_bar(0, 1, width=40, size=12)
    )
    for x, y, width, height in panel.boxes:
        assert (height, width) == shape
        assert (panel.pixels[y : y + height, x : x + width] == RED).all()


def test_tiles_of_several_sizes_are_refused():
    with pytest.raises(ShapeError, match="one size"):
        draw_panel([Tile("a", flat(RED)), Tile("b", flat(RED, 61, 90))])


def test_text_is_shortened_to_its_room():
    name = "holiday/2024/very/deep/folder/IMG_0001.jpg"
    for keep, end in (("start", "holiday"), ("end", "0001.jpg")):
        short = fit(name, 16, 150, keep=keep)
        assert text_width(short, 16) <= 150 and "…" in short and end in short
    assert fit(name, 16, 10_000) == name
    assert fit("abc", 16, 1) == ""
    assert plain("Żółć café 4×4") == "Zolc cafe 4x4" and plain("猫.jpg") == "?.jpg"


# --- colours --------------------------------------------------------------------------------------


def test_overlay_and_greys():
    photo, colours = flat(RED), flat(BLUE)
    np.testing.assert_array_equal(overlay(photo, colours, 0), photo)
    np.testing.assert_array_equal(overlay(photo, colours, 1), colours)
    half = np.zeros((60, 90), dtype=np.float32)
    half[:, 45:] = 1
    mixed = overlay(photo, colours, half)
    assert (mixed[:, :45] == RED).all() and (mixed[:, 45:] == BLUE).all()
    assert np.ptp(grey(photo), axis=2).max() == 0
    dark = darken(photo, half)
    assert (dark[:, :45] < 60).all() and (dark[:, 45:] == RED).all()


def test_heat_gets_lighter_with_every_step():
    ramp = heat_colours(np.linspace(-1, 1, 200)[None], -1, 1)[0].astype(float)
    lightness = ramp @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > -0.5).all() and lightness[0] < 20 and lightness[-1] > 230
    outside = heat_colours(np.array([[-9.0, 9.0, np.nan]]), -1, 1)[0]
    assert (outside[0] == ramp[0]).all() and (outside[1] == ramp[-1]).all()
    assert (heat_colours(np.ones((2, 2)), 1, 1) == ramp[0].astype(int)).all()  # no range


@pytest.mark.parametrize("where", [(45.5, 30.5), (0.5, 0.5), (89.5, 59.5)])
def test_marker_surrounds_its_point_and_leaves_it_visible(where):
    before = flat(GREEN)
    after = mark_point(before, *where)
    x, y = int(where[0]), int(where[1])
    assert (after[y, x] == GREEN).all() and (before == GREEN).all()
    rows, columns = np.nonzero((after != GREEN).any(-1))
    assert len(rows) > 20
    assert np.hypot(rows - y, columns - x).max() < 20
    if where == (45.5, 30.5):
        assert abs(rows.mean() - y) < 0.6 and abs(columns.mean() - x) < 0.6


def test_colour_bar_runs_from_its_low_to_its_high_end():
    bar = colour_bar(-0.25, 1.0, width=100, size=14)
    row = bar[bar.shape[0] // 2].astype(int)
    warm = (row.max(1) - row.min(1)) > 60
    assert 80 <= warm.sum() <= 101 and bar.shape[1] > 130


# --- contact sheets -------------------------------------------------------------------------------


def test_rows_are_full_and_in_order():
    rng = np.random.default_rng(1)
    aspects = (2 * rng.uniform(0.5, 2.0, 37)).tolist()
    rows = justify(aspects, 1600, 200)
    assert [i for row, _ in rows for i in row] == list(range(37))
    for row, height in rows[:-1]:
        width = sum(aspects[i] * height for i in row) + 18 * (len(row) - 1)
        assert abs(width - 1600) < 12
        assert 100 < height < 400
    assert rows[-1][1] <= 230


def test_sheet_shows_each_photograph_beside_its_colours():
    colours = [(RED, GREEN), (BLUE, GOLD), (GREEN, RED)]
    shapes = [(100, 150), (150, 100), (10, 200)]
    entries = [
        Entry(f"n{i}.jpg", shape, lambda pair=pair, s=shape: (flat(pair[0], *s), flat(pair[1], *s)))
        for i, (pair, shape) in enumerate(zip(colours, shapes, strict=True))
    ]
    sheet = draw_sheet(entries)
    assert sheet.shape[1] == 1680
    for first, second in colours[:2]:
        one = np.argwhere((sheet == first).all(-1))
        two = np.argwhere((sheet == second).all(-1))
        assert len(one) > 5000 and len(two) > 5000
        assert one[:, 1].min() < two[:, 1].max()


def test_sheet_of_one_narrow_picture():
    sheet = draw_sheet(
        [Entry("a", (2000, 10), lambda: (flat(RED, 2000, 10), flat(BLUE, 2000, 10)))]
    )
    assert (sheet == RED).all(-1).any() and sheet.shape[1] >= 420


# --- similarity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 5, 64])
def test_similarity_equals_the_cosine_of_the_whole_map(block):
    g = torch.Generator().manual_seed(6)
    x, image = torch.randn(1, 16, 6, 8, generator=g), torch.randn(1, 3, 48, 64, generator=g)
    up = ToyUpsampler()
    weights = up.kernels(x, image)
    dense = up.reassemble(weights, x)[0]  # [C, H, W]: what the function must not build
    points = [(10, 20), (47, 63), (0, 0)]
    low, high = similarity_maps(
        x[0], lambda value: up.reassemble(weights, value[None])[0], points, block=block
    )
    for n, (row, column) in enumerate(points):
        query = dense[:, row, column]
        torch.testing.assert_close(high[n], F.cosine_similarity(dense, query[:, None, None], dim=0))
        torch.testing.assert_close(low[n], F.cosine_similarity(x[0], query[:, None, None], dim=0))
        assert high[n, row, column] == pytest.approx(1, abs=1e-5)


def test_similarity_of_zero_features_is_zero():
    low, high = similarity_maps(
        torch.zeros(4, 2, 2), lambda v: F.interpolate(v[None], (4, 4))[0], [(1, 1)]
    )
    assert (low == 0).all() and (high == 0).all()
