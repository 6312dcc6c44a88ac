"""Decoding: the same picture from every kind of file, and one sentence for every bad one."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from drawn import draw, gradient
from PIL import Image

from fmupsample.errors import ImageError
from fmupsample.images import find_images, read_image, read_picture, read_size
from fmupsample.labels.values import read_values
from fmupsample.video.clips import open_capture

PICTURE = gradient(24, 36)


@pytest.mark.parametrize("extension", ["png", "bmp", "tif", "webp", "ppm", "tga"])
def test_lossless_formats(extension: str, tmp_path: Path) -> None:
    path = draw(
        tmp_path / f"a.{extension}", 24, 36, **({"lossless": True} if extension == "webp" else {})
    )
    np.testing.assert_array_equal(read_image(path), PICTURE)
    assert read_image(path).dtype == np.uint8
    assert read_size(path) == (24, 36)


_FILE_OF = {  # how an upright picture must be stored for each orientation tag
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: p.transpose(1, 0, 2)[::-1],
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: p.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["png", "tif", "jpg"])
def test_exif_orientation(orientation: int, extension: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(_FILE_OF[orientation](PICTURE))
    path = tmp_path / f"a.{extension}"
    options = {"quality": 95, "subsampling": 0} if extension == "jpg" else {}
    Image.fromarray(stored).save(path, exif=exif, **options)
    tolerance = 6 if extension == "jpg" else 0
    assert read_size(path) == (24, 36)
    difference = np.abs(read_image(path).astype(int) - PICTURE)
    assert difference.max() <= tolerance


def test_deep_grey_is_scaled_by_its_range(tmp_path: Path) -> None:
    values = np.array([[0, 128, 257, 32768, 65535]], dtype=np.uint16)
    expected = [0, 0, 1, 128, 255]
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert read_image(tmp_path / name)[0, :, 0].tolist() == expected
    # big-endian TIFF, and the same with "white is zero", written by hand
    for photometric, wanted in ((1, expected), (0, [255 - e for e in (0, 0, 1, 128, 255)])):
        path = tmp_path / f"be{photometric}.tif"
        path.write_bytes(_tiff(values, photometric))
        got = read_image(path)[0, :, 0].astype(int)
        assert np.abs(got - wanted).max() <= 1


def _tiff(values: np.ndarray, photometric: int) -> bytes:
    data = values.astype("<u2").tobytes()
    entries = [
        (256, 3, 1, values.shape[1]),
        (257, 3, 1, values.shape[0]),
        (258, 3, 1, 16),
        (259, 3, 1, 1),
        (262, 3, 1, photometric),
        (273, 4, 1, 8),
        (277, 3, 1, 1),
        (278, 3, 1, values.shape[0]),
        (279, 4, 1, len(data)),
    ]
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", *entry) for entry in entries) + b"\0\0\0\0"
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, 1] = (200, 0, 0, 255)
    rgba[0, 2] = (200, 0, 0, 128)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    got = read_image(tmp_path / "a.png")[0].astype(int)
    assert got[0].tolist() == [255, 255, 255]
    assert got[1].tolist() == [200, 0, 0]
    assert np.abs(got[2] - [227, 127, 127]).max() <= 1

    Image.fromarray(rgba).convert("LA").save(tmp_path / "la.png")
    assert read_image(tmp_path / "la.png")[0, 0].tolist() == [255, 255, 255]

    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.gif", transparency=0)
    assert read_image(tmp_path / "p.gif")[0].tolist() == [[255, 255, 255], [9, 9, 9]]


def test_other_modes(tmp_path: Path) -> None:
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    red.convert("CMYK").save(tmp_path / "cmyk.tif")
    assert read_image(tmp_path / "cmyk.tif")[0, 0].tolist() == [255, 0, 0]
    red.convert("P").save(tmp_path / "p.png")
    assert np.abs(read_image(tmp_path / "p.png")[0, 0].astype(int) - [255, 0, 0]).max() <= 1
    Image.new("1", (4, 4), 1).save(tmp_path / "one.png")
    assert read_image(tmp_path / "one.png").min() == 255
    Image.new("L", (4, 4), 77).save(tmp_path / "grey.jpg")
    assert np.abs(read_image(tmp_path / "grey.jpg").astype(int) - 77).max() <= 1


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), c) for c in ((0, 0, 255), (0, 255, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.gif")[0, 0].tolist() == [0, 0, 255]


def test_one_pixel(tmp_path: Path) -> None:
    assert read_image(draw(tmp_path / "a.png", 1, 1)).shape == (1, 1, 3)


def test_large_jpeg_is_decoded_smaller_but_alike(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    Image.fromarray(gradient(800, 1200)).save(path, quality=95, exif=exif)
    asked = []

    def wanted(size: tuple[int, int]) -> tuple[int, int]:
        asked.append(size)
        return 120, 80

    pixels, original = read_picture(path, wanted)
    assert asked == [(1200, 800)] and original == (1200, 800)
    assert pixels.shape == (300, 200, 3)  # a quarter: at least twice what is wanted
    small = Image.fromarray(pixels).resize((80, 120), Image.Resampling.BICUBIC)
    full = Image.fromarray(read_image(path)).resize((80, 120), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(small).astype(int) - np.asarray(full)).max() <= 3


def _jpeg(tmp_path: Path, **options: object) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / "whole.jpg"
    Image.fromarray(noise).save(path, **options)
    return path.read_bytes()


def _huge_png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"x") + chunk(b"IEND", b"")
    )


def test_bad_files_give_one_sentence(tmp_path: Path) -> None:
    jpeg, progressive = _jpeg(tmp_path), _jpeg(tmp_path, progressive=True)
    png = (draw(tmp_path / "whole.png")).read_bytes()
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.ones((4, 4), dtype=np.int32)).save(tmp_path / "int32.tif")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to("nowhere")
    contents = {
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "cut_progressive.jpg": progressive[: len(progressive) // 2],
        "cut.png": png[: len(png) // 2],
        "text.jpg": b"hello, I am text\n" * 9,
        "empty.png": b"",
        "header.jpg": jpeg[:20],
        "bomb.png": _huge_png(),
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    expected = {
        "cut.jpg": "damaged or cut off: .*truncated",
        "cut_progressive.jpg": "damaged or cut off",
        "cut.png": "damaged or cut off",
        "text.jpg": "not a picture in a format",
        "empty.png": r"empty \(0 bytes\)",
        "header.jpg": "not a picture|damaged",
        "bomb.png": "million pixels that are decoded safely",
        "script.eps": "not a picture",
        "float.tif": "floating-point pixels",
        "int32.tif": "32-bit pixels",
        "folder.jpg": "is a folder",
        "link.jpg": "does not exist",
        "missing.jpg": "does not exist",
    }
    for name, message in expected.items():
        for read in (read_image, lambda path: read_picture(path, lambda size: (8, 8))):
            with pytest.raises(ImageError, match=message) as caught:
                read(tmp_path / name)
            assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_random_damage_is_never_another_exception(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    path = tmp_path / "a"
    for whole in (
        _jpeg(tmp_path),
        draw(tmp_path / "b.png").read_bytes(),
        draw(tmp_path / "b.tif").read_bytes(),
        draw(tmp_path / "b.gif").read_bytes(),
        draw(tmp_path / "b.webp").read_bytes(),
    ):
        for _ in range(25):
            damaged = bytearray(whole)
            for position in random.integers(0, min(len(whole), 400), 6):
                damaged[position] = random.integers(256)
            path.write_bytes(damaged)
            try:
                pixels = read_image(path)
            except ImageError:
                continue
            assert pixels.dtype == np.uint8 and pixels.ndim == 3


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    os.mkfifo(tmp_path / "x.mp4")
    for source in find_images([tmp_path / "*.*"], videos=True):
        with pytest.raises(ImageError, match=r"is a pipe or device, not a (picture|video)"):
            open_capture(source.path) if source.path.suffix == ".mp4" else read_image(source.path)
    with pytest.raises(ImageError, match="is a pipe or device, not a picture"):
        read_values(tmp_path / "x.png")


def test_labels_never_start_another_program(tmp_path: Path) -> None:
    """Pillow reads EPS by Ghostscript; labels are read like pictures."""
    Image.new("RGB", (8, 8)).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    with pytest.raises(ImageError, match="cannot be read: cannot identify"):
        read_values(tmp_path / "x.png")
