"""What a program may give as an image, and what the backbone and the pipeline make of it."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from drawn import Blocks, PatchMeans, draw, gradient
from PIL import Image

import fmupsample
from fmupsample.errors import BackboneError, FmupsampleError, ImageError, ShapeError, UsageError
from fmupsample.images.inputs import read_input
from fmupsample.images.size import ImageSize


def test_the_same_image_in_every_form(tmp_path: Path) -> None:
    pixels = gradient(48, 64)
    path = draw(tmp_path / "a.png", 48, 64)
    planes = torch.from_numpy(pixels).permute(2, 0, 1)
    forms = [
        *(path, str(path), Image.open(path), Image.fromarray(pixels)),
        *(pixels, pixels[:, ::-1][:, ::-1], pixels / 255, (pixels / 255).astype(np.float32)),
        *(planes, planes / 255, (planes / 255).double()),
    ]
    for form in forms:
        found, size = read_input(form)
        assert size == (48, 64)
        np.testing.assert_array_equal(found, pixels)
    grey, _ = read_input(pixels[..., 0])
    assert grey.shape == (48, 64, 3) and (grey == pixels[..., :1]).all()


def test_pillow_images_are_read_as_their_files(tmp_path: Path) -> None:
    rotated = Image.Exif()
    rotated[0x0112] = 6
    path = draw(tmp_path / "turned.jpg", 48, 64, exif=rotated)
    assert read_input(Image.open(path))[1] == (64, 48)
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert (read_input(clear)[0] == 255).all()
    with pytest.raises(ImageError, match="the image has floating-point pixels"):
        read_input(Image.new("F", (8, 8)))
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ImageError, match=r"cut\.jpg is damaged or cut off"):
        read_input(Image.open(cut))


@pytest.mark.parametrize(
    ("image", "kind", "message"),
    [
        (7, UsageError, "of type int is not understood: give a path"),
        (np.zeros((3, 8, 8), np.uint8), ShapeError, r"RGB \[H, W, 3\] or grey .* got \[3, 8, 8\]"),
        (torch.zeros(8, 8, 3), ShapeError, r"as a tensor is \[3, H, W\], got \[8, 8, 3\]"),
        (np.zeros((8, 8, 3), np.uint16), UsageError, "uint16 numbers has no agreed white"),
        (torch.full((3, 8, 8), 200.0), UsageError, "from 200 to 200: divide it by 255"),
        (torch.linspace(-2, 2, 192).view(3, 8, 8), UsageError, r"for the backbone itself"),
        (np.full((8, 8, 3), np.nan), UsageError, "from nan to nan: give uint8"),
        ("missing.jpg", ImageError, r"missing\.jpg does not exist"),
    ],
)
def test_what_is_no_image_is_told_in_a_sentence(image, kind, message) -> None:
    with pytest.raises(kind, match=message):
        read_input(image)


@pytest.mark.parametrize("size", [64, 240])
def test_prepared_as_timm_prepares(tiny_backbone, size) -> None:
    """The same numbers where nothing is resized; else what bicubic filters differ by."""
    pixels = gradient(size, size)
    theirs = timm.data.create_transform(
        (3, 64, 64), mean=tiny_backbone.mean, std=tiny_backbone.std, interpolation="bicubic",
        crop_pct=1.0,
    )(Image.fromarray(pixels))  # fmt: skip
    ours = tiny_backbone.prepare(pixels, image_size=64)
    assert ours.shape == (1, 3, 64, 64)
    apart = 1e-6 if size == 64 else 2.01 / 255 / min(tiny_backbone.std)
    torch.testing.assert_close(ours[0], theirs, rtol=0, atol=apart)


def test_prepare_makes_batches_and_keeps_the_aspect_ratio(tiny_backbone) -> None:
    wide, tall = gradient(60, 90), gradient(90, 60)
    assert tiny_backbone.prepare(wide, image_size=32).shape == (1, 3, 32, 48)
    assert tiny_backbone.prepare([wide, wide], image_size="native").shape == (2, 3, 64, 96)
    assert tiny_backbone.prepare([wide, tall], image_size=(32, 64)).shape == (2, 3, 32, 64)
    batch = torch.zeros(2, 3, 32, 48, dtype=torch.uint8)
    assert tiny_backbone.prepare(batch, image_size=32).shape == (2, 3, 32, 48)
    with pytest.raises(ShapeError, match=r"there are 32x48, 48x32: give image_size=\(H, W\)"):
        tiny_backbone.prepare([wide, tall], image_size=32)
    with pytest.raises(ShapeError, match="there are none"):
        tiny_backbone.prepare([])
    with pytest.raises(UsageError, match="the nearest is 32x32"):
        tiny_backbone.prepare(wide, image_size=(30, 32))


def test_transform_in_the_workers_of_a_loader(tiny_backbone, tmp_path) -> None:
    transform = pickle.loads(pickle.dumps(tiny_backbone.transform.to_size((32, 48))))
    paths = [draw(tmp_path / f"{n}.png", 40 + n, 60) for n in range(3)]

    class Photos(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, n: int) -> torch.Tensor:
            return transform(paths[n])

    (batch,) = torch.utils.data.DataLoader(Photos(), batch_size=3)
    assert tiny_backbone(batch).shape == (3, 64, 2, 3)
    torch.testing.assert_close(batch, tiny_backbone.prepare(paths, image_size=(32, 48)))


def test_the_backbone_takes_images_themselves(tiny_backbone, tmp_path) -> None:
    path = draw(tmp_path / "a.png", 448, 672)
    expected = tiny_backbone(tiny_backbone.prepare(path))
    torch.testing.assert_close(tiny_backbone(Image.open(path)), expected)
    torch.testing.assert_close(tiny_backbone(str(path)), expected)
    four = fmupsample.backbones.ViewedBackbone(tiny_backbone, 4)
    assert four(gradient(448, 448)).shape == (1, 64, 56, 56)


def test_wrong_numbers_are_told_in_a_sentence(tiny_backbone) -> None:
    pixels = torch.rand(1, 3, 32, 32)
    with pytest.raises(UsageError, match=r"reach at most 1, and these 2\d\d.*0 to 255\?"):
        tiny_backbone(pixels * 255)
    with pytest.raises(UsageError, match=r"float16 and the backbone is float32: use images.to\("):
        tiny_backbone(pixels.half())
    with pytest.raises(UsageError, match="float64 and the backbone is float32"):
        tiny_backbone(pixels.double())
    with pytest.raises(UsageError, match=r"on meta and the backbone is on cpu: use images.to\('c"):
        tiny_backbone(pixels.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tiny_backbone(pixels.bfloat16()).shape == (1, 64, 2, 2)
    assert tiny_backbone(2 * torch.randn(1, 3, 32, 32)).isfinite().all()


def test_sizes_as_programs_write_them() -> None:
    assert ImageSize.of(None) is None
    assert ImageSize.of(448) == ImageSize.of("448") == ImageSize(short=448)
    assert ImageSize.of((448, 672)) == ImageSize.of("448x672") == ImageSize(exact=(448, 672))
    assert ImageSize.of(ImageSize()) == ImageSize.of("native") == ImageSize()
    for wrong in (0, (448,) * 3, 44.8, "large"):
        with pytest.raises(UsageError, match="is not understood"):
            ImageSize.of(wrong)


def test_pipeline_takes_paths_folders_and_patterns(pictures, monkeypatch) -> None:
    monkeypatch.chdir(pictures)
    pipeline = fmupsample.Pipeline(PatchMeans(), Blocks(), image_size=32)

    def names(sources) -> list[str]:
        return [item.source.path.name for item in pipeline.items(sources)]

    assert names(["square.png", Path("deep/bar.jpg")]) == ["square.png", "bar.jpg"]
    assert names("disc.png") == ["disc.png"]
    assert names(["deep", "*.png"]) == ["bar.jpg", "disc.png", "square.png"]
    assert len(names(pictures)) == 3
    for wrong in ([3], [Image.new("RGB", (8, 8))]):
        with pytest.raises(UsageError, match=r"cannot be found: give paths"):
            names(wrong)


def test_pipeline_raises_what_nobody_is_told(pictures) -> None:
    pipeline = fmupsample.Pipeline(PatchMeans(), Blocks())
    (pictures / "bad.jpg").write_text("no")
    with pytest.raises(ImageError, match=r"bad\.jpg is not a picture"):
        list(pipeline.items([pictures / "bad.jpg"]))
    with pytest.raises(ImageError, match=r"gone\.jpg does not exist"):
        list(pipeline.items([pictures / "gone.jpg"]))
    told: list[FmupsampleError] = []
    items = pipeline.items(pictures, on_error=lambda source, error: told.append(error))
    assert len(list(items)) == 3 and len(told) == 1


def test_pipeline_on_an_image_in_hand(tmp_path) -> None:
    pipeline = fmupsample.Pipeline(PatchMeans(), Blocks(), image_size="32x64")
    path = draw(tmp_path / "a.png", 60, 90)
    (expected,) = pipeline.items([path])
    for image in (path, Image.open(path), gradient(60, 90)):
        item = pipeline.item(image)
        torch.testing.assert_close(item.features, expected.features)
        assert pipeline.upsample(item).shape == (6, 32, 64)
        assert item.frame.original == (60, 90)
    with pytest.raises(ShapeError, match="as a tensor"):
        pipeline.item(torch.zeros(8, 8))


def test_the_pipelines_device_is_the_commands(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert fmupsample.Pipeline(PatchMeans()).device == torch.device("cpu")
    asked = []
    monkeypatch.setattr(
        "fmupsample.pipeline.features.resolve_device",
        lambda name: asked.append(name) or torch.device("cpu"),
    )
    fmupsample.Pipeline(PatchMeans())
    assert asked == ["auto"]


def test_the_shipped_backbone_from_a_path() -> None:
    try:
        backbone = fmupsample.load_backbone()
    except BackboneError as error:
        pytest.skip(f"the embedded weights are not there: {error}")
    cat = Path(__file__).parents[1] / "examples/images/cat.jpg"
    with torch.no_grad():
        assert backbone(backbone.prepare(cat, image_size=112)).shape == (1, 384, 8, 12)


def test_the_readme_runs_as_pasted(monkeypatch, tmp_path) -> None:
    root = Path(__file__).parents[1]
    section = (root / "README.md").read_text().split("## As a library")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(root / "examples")
    names: dict = {}
    with torch.no_grad():
        for block in blocks:
            exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "cat.png").is_file()
    assert names["y"].shape[-2:] == names["images"].shape[-2:]
    torch.testing.assert_close(names["scores"], names["y"][:, :5], rtol=1e-4, atol=1e-4)
