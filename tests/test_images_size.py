"""Sizes, and the way between the original picture and what the backbone sees."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drawn import gradient
from hypothesis import given
from hypothesis import strategies as st

from fmupsample.errors import ImageError, UsageError
from fmupsample.images import Frame, ImageSize, check_output_size, parse_output_size, plan_frame
from fmupsample.images.prepare import fit_to_frame, normalise


def grid(multiple: int = 14, fixed: tuple[int, int] | None = None, default: int = 448):
    return SimpleNamespace(
        size_multiple=(multiple, multiple), fixed_size=fixed, default_image_size=default
    )


sides = st.integers(1, 3000)
multiples = st.sampled_from([1, 8, 14, 16, 32])
sizes = st.one_of(
    st.none(),
    st.just(ImageSize()),
    st.integers(1, 1000).map(lambda n: ImageSize(short=n)),
)


@given(sides, sides, sizes, multiples, st.sampled_from(["resize", "pad"]))
def test_every_frame_is_sound_and_maps_back(h, w, image_size, multiple, fit) -> None:
    try:
        frame = plan_frame((h, w), image_size, grid(multiple), fit)
    except ImageError:
        assert max(h, w) > 16 * min(h, w)
        return
    assert frame.original == (h, w)
    for placed, canvas in zip(frame.placed, frame.canvas, strict=True):
        assert canvas % multiple == 0 and 1 <= placed <= canvas < placed + multiple
    if fit == "resize":
        assert frame.placed == frame.canvas
    elif image_size == ImageSize():
        assert frame.placed == (h, w)
    else:
        assert min(frame.placed) == (image_size.short if image_size else 448)
    assert Frame.from_json(frame.to_json()) == frame
    # corners onto corners, and there and back again
    assert frame.to_canvas((0, 0)) == (0, 0)
    assert frame.to_canvas((w, h)) == pytest.approx((frame.placed[1], frame.placed[0]))
    for x, y in ((0.5, 0.5), (w / 3, h / 7), (w - 0.5, h - 0.5)):
        assert frame.to_original(frame.to_canvas((x, y))) == pytest.approx((x, y))


@given(sides, sides, st.integers(1, 60), st.integers(1, 60))
def test_fixed_size_holds_the_whole_picture(h, w, rows, columns) -> None:
    fixed = (rows * 8, columns * 8)
    frame = plan_frame((h, w), None, grid(8, fixed), "resize")
    assert frame.canvas == fixed
    assert all(1 <= p <= c for p, c in zip(frame.placed, fixed, strict=True))
    assert frame.placed[0] == fixed[0] or frame.placed[1] == fixed[1]
    # the aspect ratio is kept, up to rounding to whole pixels
    scale = min(fixed[0] / h, fixed[1] / w)
    assert abs(frame.placed[0] - h * scale) <= 1 and abs(frame.placed[1] - w * scale) <= 1


def test_examples() -> None:
    def plan(original, size, fit="resize", **kw):
        frame = plan_frame(original, size and ImageSize.parse(size), grid(**kw), fit)
        return frame.placed, frame.canvas

    assert plan((480, 640), "448") == ((448, 602), (448, 602))  # 597.3 -> 42.67 -> 43 cells
    assert plan((480, 640), "448", "pad") == ((448, 597), (448, 602))
    assert plan((480, 640), None) == ((448, 602), (448, 602))
    assert plan((480, 640), "448x672") == ((448, 672), (448, 672))
    assert plan((480, 640), "448x448", "pad") == ((336, 448), (448, 448))
    assert plan((480, 640), "native") == ((476, 644), (476, 644))
    assert plan((480, 640), "native", "pad") == ((480, 640), (490, 644))
    assert plan((1, 1), "448") == ((448, 448), (448, 448))
    assert plan((1, 1), "native") == ((14, 14), (14, 14))
    assert plan((480, 640), None, fixed=(224, 224)) == ((168, 224), (224, 224))
    assert plan((480, 640), "224", fixed=(224, 224)) == ((168, 224), (224, 224))
    assert plan((480, 640), "224x224", fixed=(224, 224)) == ((224, 224), (224, 224))


@pytest.mark.parametrize(
    ("size", "fixed", "message"),
    [
        ("450x672", None, "the nearest is 448x672"),
        ("5x5", None, "the nearest is 14x14"),
        ("448", (224, 224), "takes pictures of 224x224 only, not 448"),
        ("native", (224, 224), "takes pictures of 224x224 only, not native"),
    ],
)
def test_sizes_a_backbone_does_not_take(size, fixed, message) -> None:
    with pytest.raises(UsageError, match=message):
        plan_frame((480, 640), ImageSize.parse(size), grid(fixed=fixed))


def test_long_and_thin() -> None:
    with pytest.raises(ImageError, match="too long and thin"):
        plan_frame((1, 100), None, grid())
    assert plan_frame((1, 100), ImageSize(), grid()).canvas == (14, 98)


@pytest.mark.parametrize(
    "text", ["", "0", "-5", "abc", "448x", "448x672x3", "1.5", "99999", "448x0", "x448", "٣٢"]
)
def test_image_size_refuses(text) -> None:
    with pytest.raises(UsageError, match="not understood"):
        ImageSize.parse(text)


@pytest.mark.parametrize("text", ["448", "448x672", "native"])
def test_image_size_words(text) -> None:
    assert str(ImageSize.parse(f" {text.upper()} ")) == text


def test_output_sizes() -> None:
    frame = Frame((480, 640), (448, 597), (448, 602))
    assert parse_output_size("image", frame, (32, 43)) == (448, 597)
    assert parse_output_size("Original", frame, (32, 43)) == (480, 640)
    assert parse_output_size("100×200", frame, (32, 43)) == (100, 200)
    assert parse_output_size("x4", frame, (32, 43)) == (128, 171)  # 172 without the padding
    assert parse_output_size("x1.5", frame, (32, 43)) == (48, 64)
    for bad in ("", "x0", "x0.5", "x1000", "4", "4x", "image2", "0x5", "x"):
        with pytest.raises(UsageError, match="not understood"):
            check_output_size(bad)


def test_canvas_pads_by_repeating_the_edge() -> None:
    picture = gradient(20, 30)
    canvas = fit_to_frame(picture, Frame((20, 30), (20, 30), (24, 32)))
    np.testing.assert_array_equal(canvas[:20, :30], picture)
    np.testing.assert_array_equal(canvas[20:, :30], picture[-1:].repeat(4, 0))
    np.testing.assert_array_equal(canvas[:, 31], canvas[:, 29])


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    small = fit_to_frame(stripes, Frame((64, 64), (16, 16), (16, 16)))
    assert np.abs(small[:, 2:-2].astype(int) - 127).max() <= 3


def test_normalise() -> None:
    canvas = np.array([[[0, 255, 51]]], dtype=np.uint8)
    image = normalise(canvas, (0.5, 0.25, 0.1), (0.5, 0.25, 0.2))
    assert image.shape == (3, 1, 1) and image.dtype == torch.float32
    torch.testing.assert_close(image.flatten(), torch.tensor([-1.0, 3.0, 0.5]))
