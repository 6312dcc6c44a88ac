"""Feature files as arrays: the compact format against the map it stands for, and damaged files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import NotLinear, PatchMeans, draw
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import fmupsample
from fmupsample.errors import FeaturesError, UsageError
from fmupsample.formats.compact import CompactFeatures
from fmupsample.formats.layout import Layout, decode_weights, encode_weights
from fmupsample.images import ImageSize, find_images
from fmupsample.jobs.extract import Extract, ExtractOptions, extract
from fmupsample.ops import reassemble, reassemble_window
from fmupsample.pipeline import Pipeline
from fmupsample.upsamplers import (
    FADE,
    SAPA,
    FADEConfig,
    ReSFU,
    ReSFUConfig,
    SAPAConfig,
    Upsampler,
    load_upsampler,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_resfu(channels: int = 6, **options: object) -> ReSFU:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        head = ReSFU(ReSFUConfig(channels, embedding=8, middle=16, norm_groups=2, **options))
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    head.fingerprint = "small"
    return head.eval().requires_grad_(False)


def scrambled(head: Upsampler) -> Upsampler:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    head.fingerprint = "scrambled"
    return head.eval().requires_grad_(False)


METHODS = {
    "resfu": small_resfu,
    "coarse": lambda: small_resfu(neighbours="coarse"),
    "sapa": lambda: scrambled(SAPA(SAPAConfig(6, embedding=8))),
    "fade": lambda: scrambled(FADE(FADEConfig(6, compressed=8))),
    **{n: lambda n=n: load_upsampler(PatchMeans(), n) for n in ("jbu", "bilinear", "nearest")},
}


def extracted(tmp_path: Path, upsampler, options: ExtractOptions, **more) -> Path:
    """One file, of a picture of 40 x 60 pixels shown at 32 x 48."""
    photo = tmp_path / "photo.png"
    if not photo.exists():
        draw(photo)
    pipeline = Pipeline(PatchMeans(), upsampler, **more)
    out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
    report = extract(pipeline, find_images([photo]), out, options)
    assert not report.failed
    record = report.done[0]
    path = out / record["output"]
    assert record["bytes"] == path.stat().st_size
    assert list(fmupsample.open(path).shape) == record["shape"]
    return path


def bound(values: Tensor, value_error: float, weight_error: float) -> float:
    """Largest difference that the stored precisions allow; ``weight_error``: sum over a pixel.

    Differences of weights sum to 0, so they count against half the spread of the values.
    """
    spread = (values.flatten(1).amax(1) - values.flatten(1).amin(1)).max()
    return float(value_error * values.abs().max() + weight_error / 2 * spread + 2e-6)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("dtype", "bits", "value_error", "weight_error"),
    [
        ("fp32", 32, 0, 1e-6),
        ("fp32", 16, 0, 2**-10),
        ("fp16", 16, 2**-11, 2**-10),
        ("bf16", 16, 2**-8, 2**-10),
        ("fp16", 8, 2**-11, None),
    ],
)
def test_error_against_the_whole_map(
    name: str, dtype: str, bits: int, value_error: float, weight_error: float | None, tmp_path: Path
) -> None:
    upsampler = METHODS[name]()
    whole = load_file(extracted(tmp_path, upsampler, ExtractOptions(dtype="fp32")))["features"]
    options = ExtractOptions("compact", dtype, weight_bits=bits)
    f = fmupsample.open(extracted(tmp_path, upsampler, options))
    if weight_error is None:
        n = upsampler.kernel_size**2
        weight_error = 2 * (n - 1) / (511 - n)
    difference = (f.full() - whole).abs().max()
    assert difference <= bound(f.values.float(), value_error, weight_error)
    assert f.dtype == torch.float32 == f.full().dtype and f.shape == tuple(whole.shape)


@given(
    n=st.sampled_from([9, 25]),
    seed=st.integers(0, 10_000),
    sharpness=st.floats(0, 30),
)
def test_eight_bits_keep_the_sum_and_the_stated_bound(n: int, seed: int, sharpness: float) -> None:
    scores = torch.randn(n, 50, generator=generator(seed)) * sharpness
    weights = scores.softmax(0)
    back = decode_weights(encode_weights(weights, 8))
    torch.testing.assert_close(back.sum(0), torch.ones(50))
    assert (back - weights).abs().sum(0).max() <= 2 * (n - 1) / (511 - n)


SIZES = ("image", "original", "x2", "37x90", "10x90", "3x2")


@pytest.mark.parametrize("fit", ["resize", "pad"])
@pytest.mark.parametrize("size", SIZES)
def test_every_output_size_and_fit(size: str, fit: str, tmp_path: Path) -> None:
    """Also sizes that are averaged down or enlarged, and canvases with padding."""
    more = {"fit": fit, "image_size": ImageSize(short=44)}
    upsampler = small_resfu()
    dense = ExtractOptions(dtype="fp32", output_size=size)
    whole = load_file(extracted(tmp_path, upsampler, dense, **more))["features"]
    options = ExtractOptions("compact", "fp32", size, weight_bits=32)
    f = fmupsample.open(extracted(tmp_path, upsampler, options, **more))
    check_like_an_array(f, whole)


def test_maps_beyond_the_direct_size(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("fmupsample.pipeline.sizes._DIRECT_PIXELS", 1)
    upsampler = small_resfu()
    dense = ExtractOptions(dtype="fp32", output_size="101x150")
    whole = load_file(extracted(tmp_path, upsampler, dense))["features"]
    options = ExtractOptions("compact", "fp32", "101x150", weight_bits=32)
    f = fmupsample.open(extracted(tmp_path, upsampler, options))
    assert f.layout.crop < f.layout.size == (101, 150)
    check_like_an_array(f, whole)


def check_like_an_array(f, whole: Tensor) -> None:
    close = {"rtol": 1e-4, "atol": 2e-5}
    channels, height, width = whole.shape
    assert f.shape == (channels, height, width) and len(f) == channels and f.ndim == 3
    torch.testing.assert_close(f.full(), whole, **close)
    np.testing.assert_allclose(np.asarray(f), whole.numpy(), rtol=1e-4, atol=2e-5)
    assert np.asarray(f, dtype=np.float64).dtype == np.float64
    y, x = height // 2, width // 2
    for key in (
        np.s_[:, y:, :x],
        np.s_[2],
        np.s_[-1, 0, -1],
        np.s_[..., 1],
        np.s_[1:4, y],
        np.s_[:, :, ::2],
        np.s_[::2, ::7, ::5],
        np.s_[0:0],
        np.s_[:, 5:2, :],
        (slice(None), np.int64(0), slice(-2, None)),
    ):
        expected = whole.numpy()[key]
        assert f[key].shape == torch.Size(expected.shape), key
        np.testing.assert_allclose(f[key].numpy(), expected, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(
        f[:, ::-1, ::-3].numpy(), whole.numpy()[:, ::-1, ::-3], rtol=1e-4, atol=2e-5
    )
    # points: at pixel centres, between four of them, and beyond the border
    corner = f.at([(width - 0.5, height - 0.5), (0.5, 0.5), (-9, 99 * height)])
    expected = torch.stack([whole[:, -1, -1], whole[:, 0, 0], whole[:, -1, 0]])
    torch.testing.assert_close(corner, expected, **close)
    if height > 2 and width > 2:
        px, py = 1.25 + 0.5, 0.5 + 0.5
        top = 0.75 * whole[:, 0, 1] + 0.25 * whole[:, 0, 2]
        bottom = 0.75 * whole[:, 1, 1] + 0.25 * whole[:, 1, 2]
        torch.testing.assert_close(f.at([(px, py)])[0], (top + bottom) / 2, **close)
    frame = f.frame
    middle = (frame.original[1] / 2, frame.original[0] / 2)
    torch.testing.assert_close(
        f.at(np.array([middle]), original=True), f.at([(width / 2, height / 2)]), **close
    )
    assert f.at(np.empty((0, 2))).shape == (0, channels)
    # maps
    weight = torch.randn(2, channels, generator=generator(1))
    bias = torch.tensor([3.0, -4.0])
    mapped = f.map(weight, bias)
    expected = torch.einsum("nc,chw->nhw", weight, whole) + bias[:, None, None]
    torch.testing.assert_close(mapped.full(), expected, rtol=1e-3, atol=2e-4)
    twice = mapped.map(np.ones((1, 2), dtype=np.float32))
    torch.testing.assert_close(
        twice[:, :y], expected.sum(0, keepdim=True)[:, :y], rtol=1e-3, atol=4e-4
    )
    torch.testing.assert_close(
        f.map(weight[:, :, None, None])[1, 0, 0], weight[1] @ whole[:, 0, 0], rtol=1e-3, atol=2e-4
    )


@pytest.mark.parametrize("format", ["safetensors", "npy"])
def test_whole_maps_are_opened_too(format: str, tmp_path: Path) -> None:
    path = extracted(tmp_path, small_resfu(), ExtractOptions(format, "fp32"))
    whole = load_file(path)["features"] if format == "safetensors" else torch.tensor(np.load(path))
    f = fmupsample.open(path)
    if format == "npy":  # a bare array says nothing of its picture
        with pytest.raises(UsageError, match="does not say how large"):
            f.at([(0, 0)], original=True)
        f.meta["frame"] = json.dumps({k: [40, 60] for k in ("original", "placed", "canvas")})
    check_like_an_array(f, whole)


def test_pca_scores_and_tokens(tmp_path: Path) -> None:
    compact = extracted(tmp_path, small_resfu(), ExtractOptions("compact", pca=2))
    assert fmupsample.open(compact).shape == (2, 32, 48)
    tokens = extracted(tmp_path, None, ExtractOptions(tokens_only=True))
    assert fmupsample.open(tokens).shape == (6, 4, 6)


def test_a_crop_reads_and_makes_only_what_it_needs() -> None:
    """Everything that a crop does not depend on is NaN."""
    s, k = 8, 3
    values = torch.full((4, 20, 30), torch.nan)
    weights = torch.full((k * k, 20 * s, 30 * s), torch.nan)
    y0, y1, x0, x1 = 80, 90, 100, 121
    values[:, y0 // s - 2 : y1 // s + 3, x0 // s - 2 : x1 // s + 3] = 1.0
    weights[:, y0:y1, x0:x1] = 1.0
    layout = Layout("fine", k, (160, 240), (160, 240), (160, 240))
    f = CompactFeatures(values, weights, layout, {})
    torch.testing.assert_close(f[:, y0:y1, x0:x1], torch.ones(4, y1 - y0, x1 - x0))
    torch.testing.assert_close(f.at([(110.2, 85.9)]), torch.ones(1, 4))
    torch.testing.assert_close(f[2, y0:y1:5, x0:x1:10], torch.ones(2, 3))


def test_files_are_mapped_and_survive_pickling(tmp_path: Path) -> None:
    f = fmupsample.open(extracted(tmp_path, small_resfu(), ExtractOptions("compact")))
    copy = pickle.loads(pickle.dumps(f))
    assert torch.equal(copy.full(), f.full()) and copy.meta == f.meta
    assert "photo.png" in repr(f)


def test_compact_is_much_smaller(tmp_path: Path) -> None:
    sizes = {}
    backbone = PatchMeans()
    for name, options in {
        "whole": ExtractOptions(),
        "16": ExtractOptions("compact"),
        "8": ExtractOptions("compact", weight_bits=8),
    }.items():
        pipeline = Pipeline(backbone, small_resfu())
        draw(tmp_path / "p.png", 400, 600)
        report = extract(pipeline, find_images([tmp_path / "p.png"]), tmp_path / name, options)
        sizes[name] = report.done[0]["bytes"]
        # the estimate knows it beforehand
        assert Extract(pipeline, options).bytes_of((400, 600)) == pytest.approx(
            sizes[name], abs=1500
        )
    # six channels only: the weights are most of it
    assert sizes["8"] < 0.55 * sizes["16"]
    assert sizes["16"] == pytest.approx(9 * 32 * 48 * 2 + 6 * 4 * 6 * 2, abs=2000)


def test_what_has_no_kernels_is_refused(tmp_path: Path) -> None:
    draw(tmp_path / "p.png")
    pictures = find_images([tmp_path / "p.png"])
    for upsampler, options, message in (
        (NotLinear(), ExtractOptions("compact"), "no kernel weights that a compact file could"),
        (small_resfu(), ExtractOptions("compact", tokens_only=True), "no kernel weights to store"),
        (small_resfu(), ExtractOptions("compact", weight_bits=4), "use 8, 16 or 32"),
    ):
        with pytest.raises(UsageError, match=message):
            extract(Pipeline(PatchMeans(), upsampler), pictures, tmp_path / "out", options)
        assert not (tmp_path / "out").exists()


def test_indices_that_are_none() -> None:
    layout = Layout("fine", 1, (4, 4), (4, 4), (4, 4))
    f = CompactFeatures(torch.zeros(3, 2, 2), None, layout, {})
    for key in (5, (0, 4), (0, 0, 0, 0), ([0, 1],), None, True, "a", (..., ...), 1.5):
        with pytest.raises(IndexError):
            f[key]
    for points in ([1, 2], [[float("nan"), 1]], np.zeros((2, 3))):
        with pytest.raises(UsageError, match=r"\(x, y\) pairs"):
            f.at(points)
    for weight, bias in ((torch.zeros(2, 4), None), (torch.zeros(2, 3), torch.zeros(3))):
        with pytest.raises(UsageError):
            f.map(weight, bias)


# -- damaged files --------------------------------------------------------------------------------


def compact_parts() -> tuple[dict[str, Tensor], dict[str, str]]:
    layout = Layout("fine", 3, (16, 24), (16, 24), (16, 24))
    tensors = {"values": torch.zeros(2, 2, 3).half(), "weights": torch.ones(9, 16, 24).half()}
    return tensors, {"format": "fmupsample-compact/1", "layout": layout.to_json()}


def test_the_sound_file_opens(tmp_path: Path) -> None:
    tensors, meta = compact_parts()
    save_file(tensors, tmp_path / "a.safetensors", meta)
    assert fmupsample.open(tmp_path / "a.safetensors").full().abs().max() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "fmupsample-compact/9"}, "this version reads 'fmupsample-compact/1'"),
        ({"layout": "{"}, "layout is not readable"),
        ({"layout": None}, "layout is not readable"),
        ({"layout": "[1]"}, "layout is not readable"),
        ({"full": [1, 1]}, "layout is not readable"),
        ({"full": [10**12, 24]}, "layout is not readable"),
        ({"size": [0, 24]}, "layout is not readable"),
        ({"kernel_size": 2}, "layout is not readable"),
        ({"kernel_size": 5}, "in place of"),
        ({"kernel_size": 1}, "weights that it does not need"),
        ({"neighbours": "odd"}, "layout is not readable"),
        ({"weights": None}, "weights are missing"),
        ({"weights": torch.ones(9, 16, 23)}, "in place of"),
        ({"weights": torch.ones(9, 16, 24).int()}, "in place of"),
        ({"values": None}, "no values"),
        ({"values": torch.zeros(2, 17, 3)}, "for a map of"),
        ({"values": torch.zeros(0, 2, 3)}, "no values"),
        ({"format": "other"}, "holds no features"),
    ],
)
def test_damaged_compact_files(change: dict, message: str, tmp_path: Path) -> None:
    tensors, meta = compact_parts()
    for key, value in change.items():
        if key in meta:
            meta[key] = value
        elif key in tensors:
            tensors[key] = value
        else:
            meta["layout"] = json.dumps({**json.loads(meta["layout"]), key: value})
    path = tmp_path / "a.safetensors"
    save_file(
        {k: v for k, v in tensors.items() if v is not None},
        path,
        {k: v for k, v in meta.items() if v is not None},
    )
    with pytest.raises(FeaturesError, match=message) as caught:
        fmupsample.open(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    tensors, meta = compact_parts()
    whole = tmp_path / "whole.safetensors"
    save_file(tensors, whole, meta)
    content = whole.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps({"features": 1}))
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps({"features": 1}))
    (tmp_path / "empty.npy").write_bytes(b"")
    np.save(tmp_path / "object.npy", np.array([{"a": 1}], dtype=object))
    np.save(tmp_path / "flat.npy", np.zeros(3, dtype=np.float32))
    (tmp_path / "a.pt").write_bytes(b"")
    (tmp_path / "folder.safetensors").mkdir()
    for name, message in {
        "cut.safetensors": "damaged or cut off",
        "empty.safetensors": "damaged or cut off",
        "pickle.safetensors": "damaged or cut off",
        "pickle.npy": "not a readable feature file",
        "empty.npy": "not a readable feature file",
        "object.npy": "not a readable feature file",
        "flat.npy": r"not features \[C, H, W\]",
        "a.pt": "torch.load",
        "folder.safetensors": "there is no feature file",
        "nowhere.safetensors": "there is no feature file",
    }.items():
        with pytest.raises(FeaturesError, match=message):
            fmupsample.open(tmp_path / name)


# -- the operator ---------------------------------------------------------------------------------


@given(
    h=st.integers(1, 6),
    w=st.integers(1, 6),
    more=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    k=st.sampled_from([1, 3, 5]),
    fractional=st.booleans(),
    cut=st.tuples(*[st.floats(0, 1)] * 4),
)
def test_window_is_a_part_of_the_whole(h, w, more, k, fractional, cut) -> None:
    size = (h + more[0], w + more[1])
    value = torch.randn(1, 3, h, w, generator=generator(1)).double()
    weights = torch.randn(1, k * k, *size, generator=generator(2)).double()
    (y0, y1), (x0, x1) = (
        sorted((int(a * n), int(b * n))) for a, b, n in zip(cut[::2], cut[1::2], size, strict=True)
    )
    whole = reassemble(value, weights, fractional=fractional)[..., y0:y1, x0:x1]
    part = weights[..., y0:y1, x0:x1]
    window = reassemble_window(value, part, size, (y0, x0), fractional=fractional)
    torch.testing.assert_close(window, whole, rtol=1e-12, atol=1e-12)


def test_window_refuses_what_does_not_fit() -> None:
    value, weights = torch.zeros(1, 2, 3, 4), torch.zeros(1, 9, 5, 5)
    for arguments in (
        (value[0], weights, (6, 8), (0, 0)),
        (value, weights[:, :8], (6, 8), (0, 0)),
        (value, weights, (6, 8), (2, 0)),
        (value, weights, (6, 8), (-1, 0)),
        (value, weights[..., :2, :2], (2, 8), (0, 0)),
    ):
        with pytest.raises(fmupsample.FmupsampleError):
            reassemble_window(*arguments)
