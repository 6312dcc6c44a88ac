"""Label files, class tables, and every layout in which people keep them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fmupsample.errors import ImageError, UsageError
from fmupsample.labels import (
    IGNORE,
    LAYOUTS,
    ClassTable,
    open_dataset,
    parse_classes,
    parse_ignore,
    read_labels,
    read_values,
    survey,
)
from fmupsample.labels.classes import COLOUR, class_colours
from fmupsample.labels.dataset import read_pair
from fmupsample.labels.published import ADE20K, CITYSCAPES_IDS, CITYSCAPES_TRAIN_IDS


def photo(path: Path, size=(8, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 200, 30)).save(path)
    return path


def label(path: Path, values, mode="L", size=(8, 6)) -> Path:
    """Values in stripes across a picture of ``size``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = np.array(values)[np.arange(size[0]) * len(values) // size[0]]
    pixels = np.repeat(columns[None], size[1], axis=0)
    if mode == "RGB":
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    elif mode == "P":
        picture = Image.fromarray(pixels.astype(np.uint8)).convert("L")
        picture = Image.frombytes("P", size, picture.tobytes())
        picture.putpalette([n % 256 for c in range(256) for n in (c, 255 - c, 7 * c)])
        picture.save(path)
    else:
        Image.fromarray(pixels.astype(np.uint16 if mode == "I;16" else np.uint8)).save(path)
    return path


def stems(found) -> list[tuple[str, str]]:
    return [(p.source.path.stem, p.labels.stem) for p in found.pairs]


# -- layouts ---------------------------------------------------------------------------------------


def test_parallel_folders_nested_flat_and_below_a_root(tmp_path):
    for name in ("a.jpg", "sub/b.png", "sub/c.bmp"):
        photo(tmp_path / "images" / name)
        label(tmp_path / "labels" / Path(name).with_suffix(".png"), [0, 1])
        label(tmp_path / "flat" / f"{Path(name).stem}.tif", [0, 1])
    expected = [("a", "a"), ("b", "b"), ("c", "c")]
    nested = open_dataset(tmp_path / "images", tmp_path / "labels")
    assert nested.layout == "folders" and stems(nested) == expected
    assert stems(open_dataset(tmp_path / "images", tmp_path / "flat")) == expected
    assert stems(open_dataset(tmp_path)) == expected
    (tmp_path / "few.txt").write_text("# two of them\nsub/c.bmp\na\n")
    few = open_dataset(tmp_path, split=str(tmp_path / "few.txt"))
    assert stems(few) == [("c", "c"), ("a", "a")]
    assert stems(open_dataset(tmp_path, split="sub")) == expected[1:]
    photo(tmp_path / "data/val/images/x.png")
    label(tmp_path / "data/val/labels/x.png", [0, 1])
    assert stems(open_dataset(tmp_path / "data", split="val")) == [("x", "x")]


def test_names_of_labels_may_have_an_end(tmp_path):
    for name, labels in (("a.jpg", "a_mask.png"), ("sub/b_l.jpg", "sub/b_l_mask.tif")):
        photo(tmp_path / "images" / name)
        label(tmp_path / "labels" / labels, [0, 1])
    found = open_dataset(tmp_path / "images", tmp_path / "labels")
    assert stems(found) == [("a", "a_mask"), ("b_l", "b_l_mask")] and not found.orphans
    label(tmp_path / "labels/a_gt.png", [0, 1])
    with pytest.raises(UsageError, match=r"a\.jpg has two label files"):
        open_dataset(tmp_path / "images", tmp_path / "labels")


def test_folders_without_labels_are_told_apart(tmp_path):
    photo(tmp_path / "images/a.jpg")
    photo(tmp_path / "labels/a.jpg")
    with pytest.raises(UsageError, match=r"no label files are there \(png .*JPEG blurs"):
        open_dataset(tmp_path / "images", tmp_path / "labels")
    with pytest.raises(UsageError, match="given for pictures and for labels"):
        open_dataset(tmp_path / "images", tmp_path / "labels/../images")


def test_same_names_in_different_folders_are_not_confused(tmp_path):
    for folder in "ab":
        photo(tmp_path / "images" / folder / "0.jpg")
    label(tmp_path / "labels/b/0.png", [0, 1])
    found = open_dataset(tmp_path / "images", tmp_path / "labels", allow_missing=True)
    assert [p.source.relative.as_posix() for p in found.pairs] == ["b/0.jpg"]
    assert [s.relative.as_posix() for s in found.missing] == ["a/0.jpg"]
    label(tmp_path / "labels/b/0.tif", [0, 1])
    with pytest.raises(UsageError, match=r"two label files: .*0\.png and .*0\.tif"):
        open_dataset(tmp_path / "images", tmp_path / "labels", allow_missing=True)


def test_voc(tmp_path):
    for name in ("2007_1", "2007_2", "2007_3"):
        photo(tmp_path / "JPEGImages" / f"{name}.jpg")
    for name in ("2007_1", "2007_3"):
        label(tmp_path / "SegmentationClass" / f"{name}.png", [0, 15, 255], "P")
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("2007_3\n")
    found = open_dataset(tmp_path)
    assert found.layout == "voc" and stems(found) == [("2007_1",) * 2, ("2007_3",) * 2]
    assert stems(open_dataset(tmp_path, split="val")) == [("2007_3",) * 2]
    table = survey(found).table
    assert len(table) == 21 and table.names[15] == "person" and table.colours[15] == (192, 128, 128)
    with pytest.raises(UsageError, match=r"no split 'test'.*found val"):
        open_dataset(tmp_path, split="test")
    (tmp_path / "ImageSets/Segmentation/bad.txt").write_text("2007_9\n")
    with pytest.raises(UsageError, match="names 2007_9, which is no picture"):
        open_dataset(tmp_path, split="bad")


@pytest.mark.parametrize("end", ["labelIds", "labelTrainIds"])
def test_cityscapes(tmp_path, end):
    values = {"labelIds": [7, 33, 3], "labelTrainIds": [0, 18, 255]}
    for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "ulm")):
        stem = f"{split}/{city}/{city}_000000_000019"
        photo(tmp_path / "leftImg8bit" / f"{stem}_leftImg8bit.png")
        label(tmp_path / "gtFine" / f"{stem}_gtFine_{end}.png", values[end])
        label(tmp_path / "gtFine" / f"{stem}_gtFine_instanceIds.png", [7, 26001], "I;16")
        label(tmp_path / "gtFine" / f"{stem}_gtFine_labelIds.png", values["labelIds"])
    found = open_dataset(tmp_path, split="train")
    assert found.layout == "cityscapes" and len(found.pairs) == 2
    assert all(p.labels.stem.endswith(end) for p in found.pairs)
    table = survey(found).table
    tables = {"labelIds": CITYSCAPES_IDS, "labelTrainIds": CITYSCAPES_TRAIN_IDS}
    assert table is tables[end] and table.names[13] == "car"
    encoded = read_pair(found.pairs[0], table)
    assert sorted(set(encoded.flat)) == [0, 18, IGNORE]
    two = open_dataset(tmp_path / "leftImg8bit", tmp_path / "gtFine")
    assert two.layout == "cityscapes" and len(two.pairs) == 3
    with pytest.raises(UsageError, match=r"no split 'test' of pictures.*train, val"):
        open_dataset(tmp_path, split="test")


def test_ade20k(tmp_path):
    assert len(ADE20K) == 150 and ADE20K.names[149] == "flag"
    for split, name in (("training", "ADE_train_1"), ("validation", "ADE_val_1")):
        photo(tmp_path / "images" / split / f"{name}.jpg")
        label(tmp_path / "annotations" / split / f"{name}.png", [0, 1, 150])
    found = open_dataset(tmp_path, split="train")
    assert found.layout == "ade20k" and stems(found) == [("ADE_train_1",) * 2]
    encoded = read_pair(found.pairs[0], survey(found).table)
    assert sorted(set(encoded.flat)) == [0, 149, IGNORE]


@pytest.mark.parametrize(
    "maps", ["stuffthingmaps/train2017", "annotations/stuff_train2017_pixelmaps"]
)
def test_coco(tmp_path, maps):
    photo(tmp_path / "images/train2017/000000000009.jpg")
    label(tmp_path / maps / "000000000009.png", [0, 50, 181, 255], "P")
    found = open_dataset(tmp_path, split="train")
    assert found.layout == "coco" and len(found.pairs) == 1
    values = survey(found).table.values
    assert values == ((0, 50, 181) if "thing" in maps else (50, 181))
    # Two folders have splits as well.
    folders = tmp_path / "images", (tmp_path / maps).parent
    photo(tmp_path / "images/val2017/000000000010.jpg")
    label(
        (tmp_path / maps).parent / Path(maps).name.replace("train", "val") / "000000000010.png", [1]
    )
    for split, name in (("train", "000000000009"), ("val", "000000000010")):
        found = open_dataset(*folders, layout="coco", split=split)
        assert found.layout == "coco" and stems(found) == [(name, name)]
    with pytest.raises(UsageError, match=r"no split 'test' of pictures .*train2017, val2017"):
        open_dataset(*folders, layout="coco", split="test")


def test_a_layout_can_be_forced_and_unknown_ones_are_refused(tmp_path):
    photo(tmp_path / "JPEGImages/a.jpg")
    label(tmp_path / "SegmentationClass/a.png", [0, 1, 30])
    found = open_dataset(tmp_path / "JPEGImages", tmp_path / "SegmentationClass", layout="folders")
    assert found.table is None
    with pytest.raises(UsageError, match="layout 'kitti' is unknown: use voc, cityscapes"):
        open_dataset(tmp_path, layout="kitti")
    assert all(layout.what for layout in LAYOUTS.values())


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"folder of pictures .*nowhere does not exist"):
        open_dataset(tmp_path / "nowhere")
    photo(tmp_path / "images/a.jpg")
    photo(tmp_path / "images/b.jpg")
    with pytest.raises(UsageError, match=r"no images/ and labels/ below it \(found images\)"):
        open_dataset(tmp_path)
    label(tmp_path / "labels/c.png", [0, 1])
    with pytest.raises(UsageError, match=r"2 of 2 pictures.*a\.jpg.*1 label files.*c\.png"):
        open_dataset(tmp_path)
    label(tmp_path / "labels/a.png", [0, 1])
    with pytest.raises(UsageError, match=r"1 of 2 pictures.*b\.jpg.*--allow-missing"):
        open_dataset(tmp_path)
    assert len(open_dataset(tmp_path, allow_missing=True).pairs) == 1


# -- files -----------------------------------------------------------------------------------------


def test_numbers_are_read_as_they_are_stored(tmp_path):
    for mode in ("L", "P"):
        assert sorted(
            set(read_values(label(tmp_path / f"{mode}.png", [0, 3, 200], mode)).flat)
        ) == [
            0,
            3,
            200,
        ]
    deep = label(tmp_path / "deep.png", [0, 26001], "I;16")
    assert read_values(deep).max() == 26001
    with pytest.raises(ImageError, match="one byte a pixel; their values reach 26001"):
        read_labels(deep)
    Image.new("1", (4, 4), 1).save(tmp_path / "bits.png")
    assert read_values(tmp_path / "bits.png").tolist() == [[1] * 4] * 4
    grey = label(tmp_path / "grey.png", [(7, 7, 7), (9, 9, 9)], "RGB")
    assert sorted(set(read_values(grey).flat)) == [7, 9]
    coloured = label(tmp_path / "rgb.png", [(255, 0, 1), (0, 0, 0)], "RGB")
    assert sorted(set(read_values(coloured).flat)) == [COLOUR, COLOUR + 0xFF0001]


def test_arrays_are_labels_too(tmp_path):
    values = np.array([[0, 1, 200], [2, 2, 255]])
    for kind in (np.uint8, np.int64):
        np.save(tmp_path / "a.npy", values.astype(kind))
        found = read_values(tmp_path / "a.npy", (2, 3))
        assert found.dtype == np.int32 and (found == values).all()
    with pytest.raises(ImageError, match=r"a\.npy have 3x2 pixels, their picture has 2x2"):
        read_values(tmp_path / "a.npy", (2, 2))
    for wrong, said in (
        (values / 2, r"float64 \[2, 3\]: expected integers"),
        (values[None], r"int64 \[1, 2, 3\]: expected"),
        (values + COLOUR, "no classes"),
        (np.array([{}]), "cannot be read"),
    ):
        np.save(tmp_path / "a.npy", wrong)
        with pytest.raises(ImageError, match=rf"a\.npy.*{said}"):
            read_values(tmp_path / "a.npy")


def test_bad_files_are_named(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    whole = label(tmp_path / "whole.png", list(range(8))).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) - 30])
    Image.new("L", (4, 4)).save(tmp_path / "lossy.jpg")
    (tmp_path / "lossy.jpg").rename(tmp_path / "lossy.png")
    Image.new("RGBA", (4, 4), (1, 2, 3, 0)).save(tmp_path / "clear.png")
    Image.new("F", (4, 4)).save(tmp_path / "float.tif")
    for name, said in (
        ("empty.png", "cannot be read"),
        ("cut.png", "cannot be read"),
        ("lossy.png", "are a JPEG"),
        ("clear.png", "transparent"),
        ("float.tif", "mode F"),
        ("gone.png", "cannot be read"),
    ):
        with pytest.raises(ImageError, match=f"{name.replace('.', '[.]')}.*{said}"):
            read_values(tmp_path / name)


# -- classes ---------------------------------------------------------------------------------------


def dataset(tmp_path, values, mode="L", size=(8, 6)):
    photo(tmp_path / "images/a.png")
    label(tmp_path / "labels/a.png", values, mode, size)
    return open_dataset(tmp_path)


def test_classes_are_those_that_occur(tmp_path):
    found = survey(dataset(tmp_path, [0, 1, 3, 255], "P"))
    assert found.table.values == (0, 1, 2, 3) and found.table.ignored == (255,)
    assert found.table.colours[3] == (3, 252, 21)  # the file's own palette
    assert found.pixels.tolist() == [12, 12, 0, 12, 12] and found.sizes == {(6, 8): 1}
    assert found.pictures.tolist() == [1, 1, 0, 1]
    assert survey(dataset(tmp_path, [0, 90, 200])).table.values == (0, 90, 200)
    both = dataset(tmp_path, [0, 255])
    with pytest.raises(UsageError, match=r"fewer than two classes.*--ignore none"):
        survey(both)
    assert survey(both, ignored=()).table.values == (0, 255)
    table = survey(dataset(tmp_path, [0, 1, 3])).table
    with pytest.raises(UsageError, match="no pixel of the labels counts"):
        survey(dataset(tmp_path, [255]), table)


def test_values_and_sizes_that_do_not_fit_are_named(tmp_path):
    data = dataset(tmp_path, [0, 1, 7])
    three = parse_classes("sky,road,car")
    with pytest.raises(ImageError, match=r"a\.png hold 7.*none of the 3 classes.*--ignore 7"):
        survey(data, given=three)
    assert survey(data, given=three, ignored=(7,)).table.names == ("sky", "road", "car")
    one = survey(data, given=three, ignored=(7,)).table
    with pytest.raises(ImageError, match=r"hold 7 at x 6, y 0"):
        ClassTable(one.names, one.values, one.colours).encode(
            read_values(data.pairs[0].labels), data.pairs[0].labels
        )
    with pytest.raises(ImageError, match=r"a\.png have 9x6 pixels, their picture has 8x6"):
        survey(dataset(tmp_path, [0, 1], size=(9, 6)))
    with pytest.raises(UsageError, match=r"a class .road. and ignored at once"):
        survey(dataset(tmp_path, [0, 1]), given=three, ignored=(1,))


def test_colours_need_a_table(tmp_path):
    red, blue, black = (255, 0, 0), (0, 0, 255), (0, 0, 0)
    data = dataset(tmp_path, [red, blue, blue, black], "RGB")
    with pytest.raises(ImageError, match=r"are coloured.*--classes.*of 3 colours: #0000ff"):
        survey(data)
    given = parse_classes(str(written(tmp_path, "c.txt", "255 0 0 fire\nwater 0 0 255\n")))
    with pytest.raises(ImageError, match=r"hold colour #000000.*--ignore '#000000'"):
        survey(data, given=given)
    found = survey(data, given=given, ignored=parse_ignore(["#000000"]))
    assert found.table.indices == (0, 1) and found.table.coded_by_colour
    encoded = read_pair(data.pairs[0], found.table)
    assert encoded[0].tolist() == [0, 0, 1, 1, 1, 1, IGNORE, IGNORE]
    with pytest.raises(UsageError, match="no colour for water"):
        survey(data, given=parse_classes("water,fire"))
    # A file that is black all over is stored as colours too, not as the number 0.
    label(tmp_path / "labels/a.png", [black], "RGB")
    assert (read_pair(data.pairs[0], found.table) == IGNORE).all()


def written(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    return tmp_path / name


@pytest.mark.parametrize(
    "name, text",
    [
        (
            "a.json",
            json.dumps([{"name": "traffic light", "id": 4, "color": [1, 2, 3]}, {"name": "b"}]),
        ),
        ("a.csv", "name,value,r,g,b\ntraffic light,4,1,2,3\nb,,,,\n"),
        ("a.txt", "# names\n4: traffic light #010203\nb\n"),
        ("b.txt", "4: 1 2 3 traffic light\nb\n"),
        ("c.txt", "4 traffic light 1,2,3\n\nb\n"),
    ],
)
def test_classes_from_a_file(tmp_path, name, text):
    first, second = parse_classes(str(written(tmp_path, name, text)))
    assert (first.name, first.value, first.colour) == ("traffic light", 4, (1, 2, 3))
    assert (second.name, second.value, second.colour) == ("b", None, None)


def test_colours_tell_all_classes_apart():
    many = class_colours([str(n) for n in range(255)])
    assert len(set(many)) == 255 and many[0] == (0, 0, 0)
    # A background is black, wherever it stands; nothing else is.
    assert class_colours(["sky", "Background", "car"])[1] == (0, 0, 0)
    assert (0, 0, 0) not in class_colours(["sky", "car"])


def test_classes_that_cannot_be(tmp_path):
    assert [g.name for g in parse_classes("a, b c")] == ["a", "b c"]
    assert [
        g.value for g in parse_classes(str(written(tmp_path, "d.json", '{"1":"a","2":"b"}')))
    ] == [
        1,
        2,
    ]
    for text, said in (
        ("one", "fewer than two"),
        ("a,,b", "an empty one"),
        ("gone.json", "does not exist"),
        (str(written(tmp_path, "x.json", "{]")), "not understood"),
        (str(written(tmp_path, "y.json", '[{"name":"a","color":[1,2]},"b"]')), "three numbers"),
        (str(written(tmp_path, "z.csv", "name,r,g,b\na,1,2,300\nb,1,2,3\n")), "0 to 255"),
    ):
        with pytest.raises(UsageError, match=said):
            parse_classes(text)
    with pytest.raises(UsageError, match="--ignore 'x' is not understood"):
        parse_ignore(["0,x"])
    assert parse_ignore(["none"]) == () and parse_ignore(["0,1", "3"]) == (0, 1, 3)


def test_a_table_survives_json():
    table = CITYSCAPES_IDS
    assert ClassTable.from_json(json.loads(json.dumps(table.to_json()))) == table
    with pytest.raises(UsageError, match="two classes are called a"):
        ClassTable(("a", "a"), (3, 4), ((0, 0, 0),) * 2)
    with pytest.raises(UsageError, match="two classes have the value 3"):
        ClassTable(("a", "b"), (3, 3), ((0, 0, 0),) * 2)
