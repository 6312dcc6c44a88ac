"""Regions, squares, samples, labels, options: what a run is made from."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small_training import draw_pictures, options, run
from toy import ToyBackbone

from fmupsample.errors import ImageError, UsageError
from fmupsample.images import find_images
from fmupsample.labels import count_classes, read_labels
from fmupsample.labels.matching import find_labels
from fmupsample.training.cache import CROPS, Features, plan_crops
from fmupsample.training.config import TrainConfig, parse_objective
from fmupsample.training.crops import Cropper
from fmupsample.training.pictures import (
    LabelFile,
    Loaded,
    Pictures,
    list_squares,
    split_squares,
)
from fmupsample.training.regions import find_regions, split_into_blocks
from fmupsample.training.samples import Sample, Sampler, Stream

# --- regions --------------------------------------------------------------------------------------


def test_regions_follow_colours_to_the_pixel() -> None:
    picture = np.full((90, 71, 3), (200, 180, 40), dtype=np.uint8)
    picture[13:60, 21:50] = (30, 60, 160)
    regions = find_regions(picture)
    assert regions.shape == (90, 71) and regions.dtype == np.int32
    inside, outside = regions[16:57, 24:47], regions.copy()
    outside[8:65, 16:55] = regions[0, 0]
    assert (inside == inside[0, 0]).all() and (outside == regions[0, 0]).all()
    assert inside[0, 0] != regions[0, 0]
    assert np.array_equal(regions, find_regions(picture))


def test_regions_need_scikit_image(tmp_path, monkeypatch) -> None:
    pictures, output = draw_pictures(tmp_path / "pictures"), tmp_path / "head.safetensors"
    monkeypatch.setitem(sys.modules, "skimage", None)
    config = options(objective={"clusters": 1.0})
    with pytest.raises(UsageError, match=r"'fmupsample\[train\]', or do without.*share"):
        run(pictures, output, config)
    assert run(pictures, output, replace(config, cluster_share=0.0, steps=1)).score is not None


def test_without_matplotlib_there_is_no_curve(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    pictures, output, said = draw_pictures(tmp_path / "p"), tmp_path / "head.safetensors", []
    run(pictures, output, options(steps=1), say=said.append)
    assert said[-1] == "curve.png is not drawn without matplotlib: pip install 'fmupsample[train]'"
    assert not (tmp_path / "head.safetensors.train/curve.png").exists()


def test_blocks_cut_regions_at_each_pictures_own_offset() -> None:
    regions = torch.zeros(2, 8, 8, dtype=torch.int32)
    blocks = split_into_blocks(regions, 4, torch.tensor([[0, 0], [2, 1]]))
    assert blocks[0, 0].tolist() == [0] * 4 + [1] * 4
    first = int(blocks[0].max()) + 1
    assert blocks[1, 0].tolist() == [first] * 3 + [first + 1] * 4 + [first + 2]
    assert blocks[1, :, 0].tolist() == [first] * 2 + [first + 3] * 4 + [first + 6] * 2
    assert sorted(blocks.unique().tolist()) == list(range(int(blocks.max()) + 1))


# --- pictures, squares, samples -------------------------------------------------------------------


def test_squares_and_what_is_left_out(tmp_path) -> None:
    draw_pictures(tmp_path, 6)
    Image.new("RGB", (20, 300)).save(tmp_path / "thin.png")
    (tmp_path / "bad.png").write_text("no")
    said = []
    squares = list_squares(find_images([tmp_path]), 32, warn=said.append)
    # Sides of 64, 72 and 80 by 64: the last are oblong, and give both ends.
    assert [s.source.relative.name for s in squares if s.part == 1] == ["02.png", "05.png"]
    assert len(squares) == 8
    assert "1 picture is too small (under 32 pixels" in said[0] and "20x300" in said[0]
    assert "bad.png is not a picture" in said[1]
    with pytest.raises(UsageError, match=r"at least 9 usable pictures and has 6: 8 given.*smaller"):
        list_squares(find_images([tmp_path]), 32, least=9)
    training, held = split_squares(squares, 0.3)
    assert len({s.source for s in training}) == 4 and len(held) == 2
    assert not {s.source for s in training} & {s.source for s in held}


def test_pictures_are_cut_kept_and_replaced(tmp_path) -> None:
    draw_pictures(tmp_path, 4)
    squares = list_squares(find_images([tmp_path]), 32)
    (tmp_path / "01.png").write_bytes((tmp_path / "01.png").read_bytes()[:80])
    said: list[str] = []
    each = 48 * 48 * (3 + 4)
    pictures = Pictures(squares, 48, regions=True, keep_bytes=each, warn=said.append)
    first = pictures.load(0)
    assert first.pixels.shape == (48, 48, 3) and first.regions.shape == (48, 48)
    assert first.bytes == each and pictures.load(0) is first
    assert np.array_equal(pictures.load(1).pixels, pictures.load(2).pixels)
    assert pictures.load(2) is not pictures.load(2)  # there was room for one
    pictures.load(1)
    assert len(said) == 1 and "01.png" in said[0]
    left, right = pictures.load(2).pixels, pictures.load(3).pixels
    assert not np.array_equal(left, right)
    for name in ("00", "02", "03"):
        (tmp_path / f"{name}.png").unlink()
    with pytest.raises(ImageError, match="not one"):
        Pictures(squares, 48, regions=False, keep_bytes=0).load(0)


def test_samples_depend_on_their_number_alone() -> None:
    config = options()
    forwards, backwards = Sampler(config, 5), Sampler(config, 5)
    samples = [forwards(n) for n in range(20)]
    assert [backwards(n) for n in reversed(range(20))] == samples[::-1]
    for epoch in range(4):
        assert sorted(s.square for s in samples[5 * epoch : 5 * epoch + 5]) == [0, 1, 2, 3, 4]
    assert len({(s.top, s.left, s.side) for s in samples}) == 20
    assert all(0 <= s.top <= 1 - s.side and 0.55 <= s.side <= 1 for s in samples)
    assert {s.flip for s in samples} == {True, False}
    assert Sampler(options(seed=1), 5)(0) != samples[0]
    fixed = Sampler(config, 5, views=2)
    seen = {(s.square, s.view): (s.top, s.side) for s in map(fixed, range(40))}
    assert len(seen) == 10
    assert all(seen[s.square, s.view] == (s.top, s.side) for s in map(fixed, range(40, 80)))
    assert fixed(0).blocks != fixed(10).blocks  # what the backbone does not see stays new


def test_processes_share_the_samples_of_a_step(tmp_path) -> None:
    squares = list_squares(find_images([draw_pictures(tmp_path)]), 32)
    pictures = Pictures(squares, 48, regions=False, keep_bytes=10**7)

    def steps(batch: int, **share: int) -> list[list[Sample]]:
        stream = Stream(pictures, Sampler(options(), len(squares)), batch, workers=2, **share)
        return [[sample for sample, _ in step] for step in stream(3, 6)]

    whole = steps(4)
    halves = [steps(2, rank=rank, world=2) for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole


def test_crops() -> None:
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[:32, :32] = 255
    regions = np.arange(64 * 64, dtype=np.int32).reshape(64, 64)
    plain = Sample(0, 0, 0.25, 0.0, 0.5, False, (0.5, 0.99))
    mirrored = Sample(0, 0, 0.25, 0.0, 0.5, True, (0, 0))
    samples = [(s, Loaded(pixels, regions, regions.astype(np.uint8))) for s in (plain, mirrored)]
    cropper = Cropper((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), torch.device("cpu"))
    images = cropper.pictures(samples, 32)
    assert images.shape == (2, 3, 32, 32)
    assert float(images[0, 0, 0, 0]) == 2 and float(images[0, 0, 20, 0]) == -2
    assert torch.equal(images[0].flip(2), images[1])
    assert torch.equal(cropper.regions(samples, 32)[0], torch.from_numpy(regions[16:48, :32]))
    assert cropper.regions(samples, 64)[0, 0, :4].tolist() == [1024, 1024, 1025, 1025]
    assert cropper.labels(samples, 32).dtype == torch.int64
    assert cropper.offsets(samples, 16).tolist() == [[8, 15], [0, 0]]
    assert cropper.pictures(samples, 48).shape == (2, 3, 48, 48)


def test_features_are_kept_within_a_bound(tmp_path) -> None:
    squares = list_squares(find_images([draw_pictures(tmp_path)]), 32)
    pictures = Pictures(squares, 48, regions=False, keep_bytes=10**7)
    sampler = Sampler(options(), len(squares), views=1)
    samples = [(s, pictures.load(s.square)) for s in map(sampler, range(4))]
    cropper = Cropper((0.5,) * 3, (0.25,) * 3, torch.device("cpu"))
    images = cropper.pictures(samples, 32)
    backbone = ToyBackbone()
    each = 2 * 16 * (16 + 64)
    features = Features(backbone, cropper, enlarge=2, precision="fp32", keep_bytes=3 * each)
    low, fine = features(samples, images)
    assert low.shape == (4, 16, 4, 4) and fine.shape == (4, 16, 8, 8)
    assert backbone.calls == 8
    again = features(samples, images)
    assert backbone.calls == 10  # the fourth did not fit
    assert torch.equal(low, again[0]) and torch.equal(fine, again[1])
    torch.testing.assert_close(low, backbone(images), rtol=1e-3, atol=1e-3)
    # A backbone of one size sees the enlarged crop in tiles.
    backbone.fixed_size = (32, 32)
    tiled = Features(backbone, cropper, enlarge=2, precision="fp32")(samples, images)[1]
    torch.testing.assert_close(tiled, fine, rtol=1e-3, atol=1e-3)

    def views(**changes) -> int:
        config = options(**changes).resolve(backbone, torch.device("cpu"))
        return plan_crops(config, backbone, 10, 1, 10**9)

    assert views() == 0 and views(steps=1000) == CROPS and views(steps=1000, crops_kept=3) == 3
    config = options(steps=1000).resolve(backbone, torch.device("cpu"))
    assert plan_crops(config, backbone, 10, 1, 1000) == 0


# --- labels ---------------------------------------------------------------------------------------


def test_labels(tmp_path) -> None:
    pictures = draw_pictures(tmp_path / "p", 4, labels=tmp_path / "l")
    sources = find_images([pictures])
    found = find_labels([tmp_path / "l"], sources)
    assert [path.name for path in found.values()] == ["00.png", "01.png", "02.png", "03.png"]
    assert count_classes(list(found.values())) == 2
    assert set(np.unique(read_labels(found[sources[0]], (64, 64)))) == {0, 1}
    with pytest.raises(ImageError, match="64x64 pixels, their picture has 65x64"):
        read_labels(found[sources[0]], (64, 65))
    files = {source: LabelFile(path, 0.5) for source, path in found.items()}
    squares = list_squares(sources, 32, labels=files)
    loaded = Pictures(squares, 48, regions=False, keep_bytes=0).load(0)
    assert loaded.label_weight == 0.5
    assert loaded.labels.shape == (48, 48) and set(np.unique(loaded.labels)) == {0, 1}
    Image.new("RGB", (4, 4), "red").save(tmp_path / "l/00.png")
    with pytest.raises(UsageError, match="one byte a pixel; their values reach colours"):
        count_classes(list(found.values()))
    (tmp_path / "m").mkdir()
    (tmp_path / "l/01.png").rename(tmp_path / "m/01.png")
    assert len(find_labels([tmp_path / "l", tmp_path / "m"], sources)) == 4
    with pytest.raises(UsageError, match=r"1 of 4 pictures have no labels.*01\.png"):
        find_labels([tmp_path / "l"], sources)
    with pytest.raises(UsageError, match="does not exist"):
        find_labels([tmp_path / "nowhere"], sources)


# --- options --------------------------------------------------------------------------------------


def test_options() -> None:
    config = TrainConfig.from_dict({"image_sizes": 224, "objective": parse_objective("crops=2")})
    assert config.image_sizes == (224,) and config.terms == {"crops": 2.0}
    assert parse_objective("crops + masks=0.5") == {"crops": 1.0, "masks": 0.5}
    assert TrainConfig.from_dict(config.to_dict()) == config
    resolved = config.resolve(ToyBackbone(), torch.device("cpu"))
    assert resolved.image_sizes == (224,) and resolved.side == 352
    assert (resolved.steps, resolved.batch_size, resolved.precision) == (400, 2, "fp32")
    assert options(image_sizes=[3 * 16 + 1]).resolve(
        ToyBackbone(), torch.device("cpu")
    ).image_sizes == (48,)
    assert options(lr=1.0).differences(options(lr=2.0)) == []
    assert options(seed=1).differences(options()) == ["seed 1 (the run began with 0)"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 1}, "no option 'stepz'; did you mean steps"),
        ({"steps": 0}, "steps=0 must be 1 to"),
        ({"steps": 1.5}, "whole number"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": "big"}, "lr='big'"),
        ({"objective": {"edges": 1}}, "no term edges; it has clusters, crops"),
        ({"objective": {"crops": -1}}, "must be 0 or more"),
        ({"objective": {"crops": 0}}, "must be 0 or more"),
        ({"objective": 3}, "must be a mapping"),
        ({"crop": [0.9, 0.5]}, "two shares"),
        ({"scaling": "log", "mse": 1}, "no longer has the options scaling, mse: leave them out"),
        ({"objective": {"regions": 1}}, "no term regions; it has clusters, crops, masks"),
        ({"image_sizes": "big"}, "list of numbers"),
        ({"image_sizes": [8]}, "image size 8 is not possible"),
    ],
)
def test_options_that_cannot_be(values, message) -> None:
    with pytest.raises(UsageError, match=message):
        TrainConfig.from_dict(values)


@pytest.mark.parametrize("text", ["", "crops=much", "=1"])
def test_objectives_that_cannot_be(text) -> None:
    with pytest.raises(UsageError, match="is not understood"):
        parse_objective(text)


def test_options_from_a_file(tmp_path) -> None:
    (tmp_path / "c.json").write_text('{"lr": 0.5}')
    assert TrainConfig.parse(str(tmp_path / "c.json")) == {"lr": 0.5}
    assert TrainConfig.parse('{"lr": 0.25}') == {"lr": 0.25}
    for text, message in (("{", "not JSON"), (str(tmp_path / "no"), "cannot be read")):
        with pytest.raises(UsageError, match=message):
            TrainConfig.parse(text)
