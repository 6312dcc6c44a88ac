"""``fmupsample visualize`` from the command line to the files, with a toy model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from toy import ToyBackbone, ToyNonlinear, ToyUpsampler

import fmupsample_cli.loading
from fmupsample.draw.pca import PCABasis
from fmupsample.draw.renderer import Point, Renderer
from fmupsample.errors import UsageError
from fmupsample.images.find import find_images
from fmupsample.images.size import ImageSize
from fmupsample.jobs.visualize import VisualizeOptions, visualize
from fmupsample.pipeline import Pipeline
from fmupsample_cli.main import main


def picture(path: Path, size=(72, 96), seed=0, mode="RGB") -> Path:
    """A picture [H, W] of a coloured disc on a gradient."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]].astype(np.float32)
    pixels = np.stack([rows * 2, columns, 90 + 0 * rows], -1) + rng.normal(0, 3, (*size, 3))
    disc = np.hypot(rows - size[0] / 2, columns - size[1] / 2) < min(size) / 4
    pixels[disc] = rng.integers(0, 255, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode).save(path)
    return path


@pytest.fixture
def backbone(monkeypatch) -> ToyBackbone:
    """Every run of this test loads this model."""
    model = ToyBackbone()
    monkeypatch.setattr(
        fmupsample_cli.loading, "load_models", lambda *_, **__: (model, ToyUpsampler())
    )
    return model


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    picture(folder / "a.jpg", seed=1)
    picture(folder / "sub" / "b.png", (96, 64), seed=2)
    picture(folder / "sub" / "c.png", (64, 200), seed=3, mode="L")
    return folder


def run(*arguments) -> int:
    return main(["visualize", *map(str, arguments), "--device", "cpu", "--quiet"])


def names(folder: Path) -> list[str]:
    return sorted(
        p.relative_to(folder).as_posix()
        for p in folder.rglob("*")
        if p.is_file() and ".fmupsample" not in p.parts
    )


def drawn(out: Path) -> list[str]:
    """The names of the drawings that the log knows."""
    lines = (out / ".fmupsample" / "manifest.jsonl").read_text().splitlines()
    return sorted(json.loads(line)["output"] for line in lines)


def test_a_folder_becomes_panels_a_sheet_and_a_basis(backbone, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(photos, "-o", out) == 0
    expected = ["a.png", "basis.safetensors", "contact_sheet.png", "sub/b.png", "sub/c.png"]
    assert names(out) == expected
    said = capsys.readouterr().out
    assert "3 of 3 pictures" in said and "contact_sheet.png" in said
    # Both passes saw each picture, but its features were computed once.
    assert backbone.calls == 3
    for name in ("a.png", "sub/b.png"):
        assert min(Image.open(out / name).size) > 448
    metadata = PCABasis.load(out / "basis.safetensors").metadata
    assert metadata["backbone"] == "toy.v1" and metadata["layer"] == "11"


def test_tiles_share_their_colours(backbone, tmp_path):
    """A flat half of a picture has one colour in the blocks, the bilinear and the sharp tile."""
    pixels = np.zeros((64, 96, 3), dtype=np.uint8)
    pixels[:, :48], pixels[:, 48:] = (220, 40, 30), (20, 60, 200)
    Image.fromarray(pixels).save(tmp_path / "halves.png")
    pipeline = Pipeline(backbone, ToyUpsampler(), image_size=ImageSize.parse("64"))
    [source] = find_images([tmp_path / "halves.png"])
    [item] = pipeline.items([source], on_error=pytest.fail)
    artist = Renderer(pipeline)
    basis = PCABasis.fit(artist.basis_tokens(item))
    drawing = artist.draw_pca(item, basis)
    # Tiles in two rows and columns: the photograph, then the three that must agree.
    left, top, width, height = drawing.photo
    right, bottom = drawing.colours[:2]
    tiles = [drawing.pixels[y : y + height, x : x + width]
             for x, y in ((right, top), (left, bottom), (right, bottom))]  # fmt: skip
    for column in (width // 10, width - width // 10):
        colours = [tile[height // 2, column].astype(int) for tile in tiles]
        assert np.abs(np.ptp(colours, axis=0)).max() <= 2
    assert np.abs(tiles[0][5, 5].astype(int) - tiles[0][5, -5]).max() > 100


def test_drawing_by_scores_equals_drawing_by_the_whole_map(backbone, tmp_path):
    path = picture(tmp_path / "p.png")
    drawings = []
    for upsampler in (ToyUpsampler(), ToyNonlinear()):
        pipeline = Pipeline(backbone, upsampler, image_size=ImageSize.parse("64"))
        [item] = pipeline.items(find_images([path]), on_error=pytest.fail)
        artist = Renderer(pipeline, layout="single", foreground=True)
        basis = PCABasis.fit(artist.basis_tokens(item))
        [heat] = artist.draw_similarity(item, [Point(40, 30)])
        drawings.append((artist.draw_pca(item, basis).pixels, heat))
    (first, first_heat), (second, second_heat) = drawings
    assert np.abs(first.astype(int) - second).max() <= 2
    boxes = [(h.pixels, h.colours) for h in (first_heat, second_heat)]
    tiles = [p[y : y + h, x : x + w].astype(int) for p, (x, y, w, h) in boxes]
    assert np.abs(tiles[0] - tiles[1]).max() <= 2


def test_a_second_run_does_nothing_and_changes_redo_what_they_touch(backbone, photos, tmp_path):
    out = tmp_path / "out"
    assert run(photos, "-o", out, "--basis", "image") == 0
    before = {name: (out / name).stat().st_mtime_ns for name in names(out)}
    backbone.calls = 0
    assert run(photos, "-o", out, "--basis", "image") == 0
    assert backbone.calls == 0
    assert {name: (out / name).stat().st_mtime_ns for name in names(out)} == before
    # One photograph changes: with a basis of its own it alone is drawn again, and the sheet.
    picture(photos / "a.jpg", seed=9)
    assert run(photos, "-o", out, "--basis", "image") == 0
    assert backbone.calls == 1
    changed = {name for name, time in before.items() if (out / name).stat().st_mtime_ns != time}
    assert changed == {"a.png", "contact_sheet.png"}
    # Another option, or --overwrite: all of them.
    for option in ("--foreground", "--overwrite"):
        backbone.calls = 0
        assert run(photos, "-o", out, "--basis", "image", option) == 0
        assert backbone.calls == 3


def test_a_shared_basis_is_kept_for_the_same_pictures_and_made_anew_for_others(
    backbone, photos, tmp_path
):
    out = tmp_path / "out"
    run(photos, "-o", out)
    first = PCABasis.load(out / "basis.safetensors").fingerprint
    (out / "a.png").unlink()
    backbone.calls = 0
    assert run(photos, "-o", out) == 0
    assert backbone.calls == 1 and (out / "a.png").is_file()
    assert PCABasis.load(out / "basis.safetensors").fingerprint == first
    # One more picture: new colours, so all are drawn with them.
    picture(photos / "d.png", seed=4)
    backbone.calls = 0
    assert run(photos, "-o", out) == 0
    assert backbone.calls == 4
    assert PCABasis.load(out / "basis.safetensors").fingerprint != first


def test_drawings_that_stay_keep_their_colours(backbone, photos, tmp_path, capsys):
    """A later run of other pictures draws in the colours of those that are there, or not at all."""
    out = tmp_path / "out"
    assert run(photos / "a.jpg", "-o", out, "--layout", "single") == 0
    first = PCABasis.load(out / "basis.safetensors").fingerprint
    before = (out / "a.png").read_bytes()
    assert run(photos / "sub", "-o", out, "--layout", "single") == 0
    assert PCABasis.load(out / "basis.safetensors").fingerprint == first
    assert (out / "a.png").read_bytes() == before and (out / "b.png").is_file()
    # Colours of other features would say something else.
    assert run(photos / "sub", "-o", out, "--layout", "single", "--image-size", 96) == 2
    said = capsys.readouterr().err
    assert "holds 1 drawings of other pictures in the colours of another model" in said
    assert run(photos / "sub", "-o", out, "--image-size", 96, "--overwrite") == 0
    assert PCABasis.load(out / "basis.safetensors").fingerprint != first


def test_a_given_basis_gives_the_same_colours_again(backbone, photos, tmp_path):
    run(photos, "-o", tmp_path / "all", "--layout", "single")
    basis = tmp_path / "all" / "basis.safetensors"
    single = [photos / "a.jpg", "--layout", "single"]
    assert run(*single, "-o", tmp_path / "one", "--basis", basis) == 0
    assert run(*single, "-o", tmp_path / "own", "--basis", "image") == 0
    one, own, every = (
        np.asarray(Image.open(tmp_path / d / "a.png")).astype(int) for d in ("one", "own", "all")
    )
    # Features of the first run went through half precision.
    assert np.abs(one - every).max() <= 2
    assert np.abs(one - own).mean() > 3
    assert names(tmp_path / "one") == ["a.png"]


def test_a_basis_of_another_backbone_is_refused(backbone, photos, tmp_path, capsys):
    tokens = torch.randn(50, 16)
    PCABasis.fit(tokens, metadata={"backbone": "other.v2", "layer": "11"}).save(tmp_path / "b.st")
    assert run(photos, "-o", tmp_path / "out", "--basis", tmp_path / "b.st") == 2
    said = capsys.readouterr().err
    assert "other.v2" in said and "toy.v1" in said
    assert run(photos, "-o", tmp_path / "out", "--basis", "shraed") == 2
    assert "no PCA basis at shraed" in capsys.readouterr().err


def test_the_cache_of_features_may_be_too_small(backbone, photos, tmp_path):
    pipeline = Pipeline(backbone, ToyUpsampler())
    sources = find_images([photos])
    drawings = []
    for limit in (0, 30_000, 2**30):
        out = tmp_path / str(limit)
        backbone.calls = 0
        options = VisualizeOptions(layout="single", cache_bytes=limit)
        report = visualize(pipeline, sources, out, options)
        assert not report.failed and len(report.drawn) == 3
        drawings.append((backbone.calls, [np.asarray(Image.open(p)) for p in report.drawn]))
    assert [calls for calls, _ in drawings] == [6, 5, 3]
    for some, all_ in zip(drawings[0][1], drawings[2][1], strict=True):
        assert np.abs(some.astype(int) - all_).max() <= 2


def test_similarity_to_points(backbone, photos, tmp_path):
    out = tmp_path / "out"
    points = ["--point", "48,36", "--point", "3,4"]
    assert run(photos / "a.jpg", "-o", out, *points) == 0
    assert names(out) == ["a.png", "a.point-3-4.png", "a.point-48-36.png", "basis.safetensors"]
    # The same file again with another point: nothing but that is drawn.
    before = (out / "a.png").stat().st_mtime_ns
    assert run(photos / "a.jpg", "-o", out, *points, "--point", "5,5") == 0
    assert (out / "a.png").stat().st_mtime_ns == before
    points = ("3-4", "48-36", "5-5")
    assert drawn(out) == ["a.png", *(f"a.point-{point}.png" for point in points)]


def test_the_similarity_is_to_the_pixel_that_was_named(tmp_path):
    """With a wide picture whose only special spot is at the point, the spot lights up."""
    pixels = np.full((80, 160, 3), 120, dtype=np.uint8)
    pixels[56:80, 120:144] = (250, 200, 10)
    Image.fromarray(pixels).save(tmp_path / "spot.png")
    pipeline = Pipeline(ToyBackbone(), ToyUpsampler(), image_size=ImageSize.parse("64"))
    [item] = pipeline.items(find_images([tmp_path / "spot.png"]), on_error=pytest.fail)
    [drawing] = Renderer(pipeline).draw_similarity(item, [Point(132, 68)])
    x, y, width, height = drawing.colours
    tile = drawing.pixels[y : y + height, x : x + width].astype(float)
    rows, columns = np.nonzero(tile.mean(-1) > 140)
    assert abs(rows.mean() / height - 68 / 80) < 0.03
    assert abs(columns.mean() / width - 132 / 160) < 0.02


def test_points_outside_a_picture(backbone, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(photos, "-o", out, "--point", "80,10") == 3  # b.png is 64 wide
    said = capsys.readouterr().err
    assert "b.png" in said and "64 pixels wide and 96 high" in said
    assert "sub/b.png" in names(out) and "sub/b.point-80-10.png" not in names(out)
    assert "a.point-80-10.png" in names(out)
    for wrong in ("12", "a,b", "-1,5", "1,2,3", "nan,1"):
        assert run(photos, "-o", out, f"--point={wrong}") == 2
        assert "is not understood" in capsys.readouterr().err


def test_bad_pictures_are_reported_and_the_rest_is_drawn(backbone, photos, tmp_path, capsys):
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    out = tmp_path / "out"
    assert run(photos, "-o", out, "--json") == 3
    said = capsys.readouterr()
    summary = json.loads(said.out)
    assert summary["pictures"] == 4 and len(summary["drawn"]) == 3
    [failure] = summary["failed"]
    assert failure["source"].endswith("broken.jpg") and "broken.jpg" in said.err
    assert summary["contact_sheets"] == [str(out / "contact_sheet.png")]
    assert summary["basis"] == str(out / "basis.safetensors")
    # Nothing but bad ones: an error, and nothing but the log, which says why.
    assert run(photos / "broken.jpg", "-o", tmp_path / "none") == 1
    assert names(tmp_path / "none") == []


def test_results_never_replace_photographs_or_strange_files(backbone, photos, tmp_path, capsys):
    before = (photos / "sub" / "b.png").read_bytes()
    assert run(photos, "-o", photos, "--overwrite") == 2
    assert "would replace an image" in capsys.readouterr().err
    assert (photos / "sub" / "b.png").read_bytes() == before
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.png").write_text("mine")
    assert run(photos, "-o", out) == 2
    assert names(out) == ["a.png"] and (out / "a.png").read_text() == "mine"
    assert "a.png exists and is not a result recorded" in capsys.readouterr().err
    assert run(photos, "-o", out, "--overwrite") == 0
    assert (out / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_names_that_collide(backbone, tmp_path):
    for name in ("x.png", "x.jpg", "contact_sheet.jpg"):
        picture(tmp_path / "in" / name)
    out = tmp_path / "out"
    assert run(tmp_path / "in", "-o", out) == 0
    found = names(out)
    assert {"x.png.png", "x.jpg.png", "contact_sheet.jpg.png", "contact_sheet.png"} <= set(found)


def test_output_inside_the_input_is_not_drawn_again(backbone, photos):
    out = photos / "drawn"
    assert run(photos, "-o", out) == 0
    backbone.calls = 0
    assert run(photos, "-o", out) == 0
    assert backbone.calls == 0


def test_drawings_among_the_photographs_are_not_drawn(backbone, photos, capsys):
    """``-o`` may be the folder of the photographs themselves."""
    for name in ("sub/b.png", "sub/c.png"):
        (photos / name).unlink()
    picture(photos / "d.jpg", seed=5)
    assert run(photos, "-o", photos) == 0
    there = names(photos)
    assert {"a.png", "d.png", "contact_sheet.png"} < set(there)
    backbone.calls = 0
    assert run(photos, "-o", photos) == 0
    assert backbone.calls == 0 and names(photos) == there
    assert "2 of 2 pictures complete" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["single", "overlay"])
def test_single_and_overlay_have_the_size_asked_for(backbone, photos, tmp_path, layout):
    wanted = {"image": (64, 88), "original": (72, 96), "50x70": (50, 70), "x4": (32, 44)}
    for n, (text, size) in enumerate(wanted.items()):
        out = tmp_path / str(n)
        assert run(photos / "a.jpg", "-o", out, "--layout", layout, "--output-size", text) == 0
        assert Image.open(out / "a.png").size[::-1] == size
    assert run(photos, "-o", tmp_path / "p", "--output-size", "original") == 2


def test_jpeg(backbone, photos, tmp_path):
    out = tmp_path / "out"
    assert run(photos, "-o", out, "--format", "jpg", "--no-sheet") == 0
    assert names(out) == ["a.jpg", "basis.safetensors", "sub/b.jpg", "sub/c.jpg"]
    assert Image.open(out / "a.jpg").format == "JPEG"


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (200, 20), (32, 32), (300, 400)])
@pytest.mark.parametrize("layout", ["panel", "single", "overlay"])
def test_pictures_of_all_shapes(backbone, tmp_path, size, layout):
    path = picture(tmp_path / "p.png", size)
    options = ["--layout", layout, "--foreground", "--image-size", "32", "--point", "0,0"]
    assert run(path, "-o", tmp_path / "out", *options) == 0
    assert {"p.png", "p.point-0-0.png"} <= set(names(tmp_path / "out"))


def test_a_picture_of_one_colour(backbone, tmp_path):
    Image.new("RGB", (64, 64), (90, 90, 90)).save(tmp_path / "flat.png")
    for basis in ("shared", "image"):
        out = tmp_path / basis
        assert run(tmp_path / "flat.png", "-o", out, "--layout", "single", "--basis", basis) == 0
        assert np.ptp(np.asarray(Image.open(out / "flat.png"))) == 0


def test_padding_is_not_drawn(backbone, tmp_path):
    """Padded to the grid, the picture's own part alone is seen, wherever it is looked at."""
    path = picture(tmp_path / "p.png", (70, 90))
    pipeline = Pipeline(backbone, ToyUpsampler(), image_size=ImageSize.parse("native"), fit="pad")
    [item] = pipeline.items(find_images([path]), on_error=pytest.fail)
    assert item.frame.canvas == (72, 96)
    drawing = Renderer(pipeline, layout="single").draw_pca(
        item, PCABasis.fit(item.features.flatten(1).T)
    )
    assert drawing.pixels.shape[:2] == (70, 90)


def test_sheets_of_many_pictures_have_pages(backbone, tmp_path):
    for n in range(51):
        picture(tmp_path / "in" / f"{n:02}.png", (16, 16), seed=n)
    out = tmp_path / "out"
    command = [tmp_path / "in", "-o", out, "--layout", "single", "--image-size", "16"]
    assert run(*command) == 0
    sheets = [name for name in names(out) if name.startswith("contact")]
    assert sheets == ["contact_sheet.png", "contact_sheet_2.png"]
    for n in range(40):
        (tmp_path / "in" / f"{n:02}.png").unlink()
    assert run(*command) == 0
    assert [name for name in names(out) if name.startswith("contact")] == ["contact_sheet.png"]


@pytest.mark.parametrize("pictures", [3, 9])
def test_a_sheet_is_the_same_from_memory_and_from_files(backbone, tmp_path, pictures):
    for n in range(pictures):
        picture(tmp_path / "in" / f"{n:02}.png", (64, 48 + 16 * (n % 3)), seed=n)
    out = tmp_path / "out"
    sheet = out / "contact_sheet.png"
    assert run(tmp_path / "in", "-o", out, "--image-size", "64") == 0
    drawn = sheet.read_bytes()
    sheet.unlink()
    assert run(tmp_path / "in", "-o", out, "--image-size", "64") == 0
    assert sheet.read_bytes() == drawn


def test_options_that_make_no_sense():
    for options in (
        VisualizeOptions(layout="pannel"),
        VisualizeOptions(image_format="gif"),
        VisualizeOptions(layout="single", output_size="huge"),
    ):
        with pytest.raises(UsageError):
            options.check()


def test_help_needs_no_torch():
    import subprocess
    import sys

    code = "import sys; from fmupsample_cli import visualize; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_features_are_never_built_at_full_size(backbone, photos, tmp_path, monkeypatch):
    """At most three scores, a foreground score, or a block of channels reach the upsampler."""
    channels = []
    whole = ToyUpsampler.reassemble

    def watched(self, weights, value):
        channels.append(value.shape[1])
        return whole(self, weights, value)

    monkeypatch.setattr(ToyUpsampler, "reassemble", watched)
    monkeypatch.setattr("fmupsample.draw.similarity.BLOCK", 8)
    assert run(photos, "-o", tmp_path / "out", "--foreground", "--point", "5,5") == 0
    assert channels and max(channels) < backbone.channels


def test_bilinear_itself_is_not_shown_twice(backbone, tmp_path):
    class Bilinear(ToyUpsampler):
        name = "bilinear"

        def kernels(self, x, guidance=None, size=None):
            return torch.zeros(1, 1, *size)

        def reassemble(self, weights, value):
            return F.interpolate(value, weights.shape[-2:], mode="bilinear")

    path = picture(tmp_path / "p.png", (64, 64))
    widths = []
    for upsampler in (Bilinear(), ToyUpsampler()):
        pipeline = Pipeline(backbone, upsampler)
        [item] = pipeline.items(find_images([path]), on_error=pytest.fail)
        artist = Renderer(pipeline)
        widths.append(
            artist.draw_pca(item, PCABasis.fit(artist.basis_tokens(item))).pixels.shape[1]
        )
    assert widths[0] < widths[1]


@pytest.mark.parametrize("more", [[], ["--layout", "single"], ["--point", "3,4"]])
def test_nan_is_never_drawn(backbone, photos, tmp_path, capsys, monkeypatch, more):
    kernels = ToyUpsampler.kernels
    monkeypatch.setattr(ToyUpsampler, "kernels", lambda *a, **k: kernels(*a, **k) * float("nan"))
    out = tmp_path / "out"
    assert run(photos, "-o", out, *more) == 1
    assert "holds NaN or infinity, so nothing was written" in capsys.readouterr().err
    assert names(out) == ["basis.safetensors"]
