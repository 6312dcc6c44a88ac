"""Which pictures a command line names."""

from __future__ import annotations

import io
import os
from pathlib import Path, PurePosixPath

import pytest
from drawn import draw

from fmupsample.errors import UsageError
from fmupsample.images import find_images


def names(sources) -> list[str]:
    return [str(s.relative) for s in sources]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for name in ("b.JPG", "a.png", "sub/c.webp", "sub/deep/d.tif", ".hidden.png", ".cache/e.png"):
        draw(root / name, 4, 4)
    (root / "notes.txt").write_text("no picture")
    return root


def test_folder_is_searched_recursively_without_hidden_files(photos: Path) -> None:
    found = find_images([photos])
    assert names(found) == ["a.png", "b.JPG", "sub/c.webp", "sub/deep/d.tif"]
    assert all(s.path.is_file() for s in found)


def test_a_named_file_keeps_its_name_and_is_taken_whatever_its_extension(photos: Path) -> None:
    assert names(find_images([photos / "sub/c.webp", photos / "notes.txt"])) == [
        "c.webp",
        "notes.txt",
    ]


def test_each_file_once(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    found = find_images(["a.png", "./a.png", photos / "a.png", "sub/../a.png", "a.png"])
    assert names(found) == ["a.png"]
    assert len(find_images([".", photos])) == 4


def test_order_of_the_inputs_does_not_matter(photos: Path) -> None:
    one, two = photos / "a.png", photos / "sub"
    assert find_images([one, two]) == find_images([two, one])


def test_link_loops_end_and_real_folders_name_their_files(photos: Path) -> None:
    (photos / "sub/loop").symlink_to(photos)
    (photos / "sub/me").symlink_to(photos / "sub/me")
    (photos / "aaa").symlink_to(photos / "sub")
    assert names(find_images([photos])) == ["a.png", "b.JPG", "sub/c.webp", "sub/deep/d.tif"]


def test_a_link_with_a_name_of_its_own_is_a_picture(photos: Path) -> None:
    (photos / "z.png").symlink_to(photos / "a.png")
    (photos / "gone.png").symlink_to(photos / "nowhere.png")
    assert names(find_images([photos]))[-1] == "z.png"
    assert "gone.png" in names(find_images([photos]))  # reported when it is read


def test_folder_named_like_a_picture_and_fifo(photos: Path) -> None:
    draw(photos / "x.jpg" / "inside.png", 4, 4)
    os.mkfifo(photos / "pipe.png")
    found = names(find_images([photos]))
    assert "x.jpg/inside.png" in found
    assert "pipe.png" not in found
    with pytest.raises(UsageError, match="neither a file nor a folder"):
        find_images([photos / "pipe.png"])


def test_quoted_globs(photos: Path) -> None:
    assert names(find_images([f"{photos}/*"])) == ["a.png", "b.JPG", "sub/c.webp", "sub/deep/d.tif"]
    assert names(find_images([f"{photos}/**/*.tif"])) == ["sub/deep/d.tif"]
    assert names(find_images([f"{photos}/*/c.w?bp"])) == ["sub/c.webp"]
    assert names(find_images([f"{photos}/*.txt"])) == ["notes.txt"]
    (photos / "sub/loop").symlink_to(photos)
    assert len(find_images([f"{photos}/**/*.webp"])) == 1
    with pytest.raises(UsageError, match=r"no picture matches .*\*\.bmp"):
        find_images([f"{photos}/*.bmp"])


def test_brackets_in_a_name_are_a_name_if_there_is_such_a_file(tmp_path: Path) -> None:
    draw(tmp_path / "img[1].png", 4, 4)
    assert names(find_images([tmp_path / "img[1].png"])) == ["img[1].png"]


def test_list_file(photos: Path) -> None:
    listed = photos / "list.txt"
    listed.write_text("\ufeff# two of them\r\nsub/c.webp\r\n\n  a.png  \n../photos/b.JPG\nsub\n")
    assert names(find_images([], list_file=listed)) == [
        "a.png",
        "b.JPG",
        "sub/c.webp",
        "sub/deep/d.tif",
    ]


def test_list_on_standard_input(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    monkeypatch.setattr("sys.stdin", io.StringIO("sub/c.webp\n"))
    assert find_images([], list_file="-")[0].relative == PurePosixPath("sub/c.webp")


def test_list_file_errors_name_the_line(photos: Path) -> None:
    listed = photos / "list.txt"
    listed.write_text("a.png\nmissing.png\n")
    with pytest.raises(UsageError, match=r"list.txt line 2: .*missing.png does not exist"):
        find_images([], list_file=listed)
    with pytest.raises(UsageError, match="must hold one path a line"):
        find_images([], list_file=photos / "a.png")
    with pytest.raises(UsageError, match=r"none.txt cannot be read: No such file"):
        find_images([], list_file=photos / "none.txt")


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ([], "no pictures named"),
        ([""], "empty name"),
        (["nope.jpg"], "nope.jpg does not exist"),
        (["x" * 5000], "cannot be used: File name too long"),
        (["empty", "empty"], "no pictures found in empty, empty: looked for .* png"),
        (["link.png"], "link to something that does not exist"),
        (["a\0b"], "does not exist"),
    ],
)
def test_usage_errors(
    named: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("link.png").symlink_to("nowhere")
    with pytest.raises(UsageError, match=message):
        find_images(named)


def test_the_output_folder_is_not_searched(photos: Path) -> None:
    draw(photos / "out/made.png", 4, 4)
    assert "out/made.png" not in names(find_images([photos], exclude=[photos / "out"]))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_unreadable_subfolder(photos: Path) -> None:
    (photos / "sub").chmod(0)
    try:
        with pytest.raises(UsageError, match="cannot be read: Permission denied"):
            find_images([photos])
        said: list[str] = []
        assert names(find_images([photos], warn=said.append)) == ["a.png", "b.JPG"]
        assert len(said) == 1
    finally:
        (photos / "sub").chmod(0o755)
