"""Pictures -> features -> maps, on a backbone whose features are known."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from drawn import Blocks, NotLinear, PatchMeans, draw

from fmupsample.device import resolve_device
from fmupsample.errors import FmupsampleError, UsageError
from fmupsample.images import ImageSize, Source, find_images, parse_output_size
from fmupsample.pipeline import Pipeline, features, maps, sizes
from fmupsample.prefetch import prefetch


def no_error(source: Source, error: FmupsampleError) -> None:
    raise AssertionError(f"{source}: {error}")


def only_item(path: Path, upsampler=None, **options):
    pipeline = Pipeline(PatchMeans(), upsampler or Blocks(), **options)
    (item,) = pipeline.items(find_images([path]), on_error=no_error)
    return pipeline, item


def test_features_of_a_known_picture(tmp_path: Path) -> None:
    _, item = only_item(draw(tmp_path / "a.png", 32, 64), image_size=ImageSize())
    assert item.features.shape == (6, 4, 8) and item.grid == (4, 8)
    assert item.features.dtype == torch.float32
    expected = (
        torch.from_numpy(item.canvas.copy()).float().unflatten(0, (4, 8)).unflatten(2, (8, 8))
    )
    expected = (expected.mean((1, 3)).permute(2, 0, 1) / 255 - 0.5) / 0.25
    torch.testing.assert_close(item.features[:3], expected)
    torch.testing.assert_close(item.features[3:], 2 * expected)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
@pytest.mark.parametrize("workers", [0, 2])
def test_order_is_kept_and_batches_have_equal_sizes(tmp_path, batch_size, workers) -> None:
    widths = [32, 64, 32, 32, 64, 48, 32, 48, 32, 64]
    for i, width in enumerate(widths):
        draw(tmp_path / f"{i}.png", 32, width)
    backbone = PatchMeans()
    pipeline = Pipeline(backbone, batch_size=batch_size, workers=workers)
    items = list(pipeline.items(find_images([tmp_path]), on_error=no_error))
    assert [i.source.path.stem for i in items] == [str(i) for i in range(10)]
    assert [i.frame.canvas[1] for i in items] == widths
    assert max(b[0] for b in backbone.batches) <= batch_size
    assert sum(b[0] for b in backbone.batches) == len(widths)
    if batch_size == 16:  # one batch a size
        assert len(backbone.batches) == 3


def test_batches_do_not_change_features(tmp_path: Path) -> None:
    for i in range(5):
        draw(tmp_path / f"{i}.png", 32, 40 + i)
    one, many = (
        list(Pipeline(PatchMeans(), batch_size=n).items(find_images([tmp_path]), on_error=no_error))
        for n in (1, 4)
    )
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a.features, b.features)


def test_bad_pictures_are_reported_and_left_out(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no")
    draw(tmp_path / "c.png", 1, 100)
    draw(tmp_path / "d.png")
    errors: dict[str, str] = {}
    threads = set()

    def note(source: Source, error: FmupsampleError) -> None:
        errors[source.path.name] = str(error)
        threads.add(threading.current_thread())

    items = list(Pipeline(PatchMeans()).items(find_images([tmp_path]), on_error=note))
    assert [i.source.path.name for i in items] == ["a.png", "d.png"]
    assert set(errors) == {"b.png", "c.png"}
    assert "c.png: a picture of 100x1 pixels is too long and thin" in errors["c.png"]
    assert threads == {threading.current_thread()}


def test_other_errors_in_the_threads_come_out(tmp_path: Path, monkeypatch) -> None:
    draw(tmp_path / "a.png")

    def broken(*args: object) -> None:
        raise KeyError("a fault")

    monkeypatch.setattr(features, "fit_to_frame", broken)
    with pytest.raises(KeyError, match="a fault"):
        list(Pipeline(PatchMeans(), workers=2).items(find_images([tmp_path]), on_error=no_error))


def test_out_of_memory_halves_the_batch_and_spares_the_rest(tmp_path: Path) -> None:
    class Small(PatchMeans):
        def forward(self, images):
            if images.shape[0] > 2 or images.shape[-1] > 64:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(images)

    for i in range(7):
        draw(tmp_path / f"{i}.png", 32, 32)
    draw(tmp_path / "wide.png", 32, 96)
    backbone, errors = Small(), []
    pipeline = Pipeline(backbone, batch_size=8)
    items = list(
        pipeline.items(find_images([tmp_path]), on_error=lambda s, e: errors.append(str(e)))
    )
    assert len(items) == 7
    assert len(errors) == 1 and "use a smaller --image-size" in errors[0]
    assert max(b[0] for b in backbone.batches) == 2


def test_upsampled_size_and_values(tmp_path: Path) -> None:
    pipeline, item = only_item(draw(tmp_path / "a.png", 30, 45), image_size=ImageSize(), fit="pad")
    assert item.frame.canvas == (32, 48) and item.grid == (4, 6)
    out = pipeline.upsample(item)
    assert out.shape == (6, 30, 45)  # without the padding
    blocks = item.features.repeat_interleave(8, 1).repeat_interleave(8, 2)
    torch.testing.assert_close(out, blocks[:, :30, :45])
    assert pipeline.tokens(item).shape == (6, 4, 6)


def test_tokens_leave_out_cells_of_padding_only(tmp_path: Path) -> None:
    pipeline, item = only_item(
        draw(tmp_path / "a.png", 30, 60), image_size=ImageSize(exact=(64, 64)), fit="pad"
    )
    assert item.frame.placed == (32, 64) and item.grid == (8, 8)
    assert pipeline.tokens(item).shape == (6, 4, 8)


def test_values_first_is_the_same_as_values_after(tmp_path: Path) -> None:
    pipeline, item = only_item(draw(tmp_path / "a.png"))
    matrix = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    first = pipeline.upsample(item, value=torch.einsum("vc,chw->vhw", matrix, item.features))
    after = torch.einsum("vc,chw->vhw", matrix, pipeline.upsample(item))
    torch.testing.assert_close(first, after)


@pytest.mark.parametrize("layout", ["panel", "single", "overlay"])
@pytest.mark.parametrize("foreground", [False, True])
def test_pca_pictures_never_make_a_map_of_all_channels(
    tmp_path: Path, monkeypatch, layout, foreground
) -> None:
    from fmupsample.draw.pca import PCABasis
    from fmupsample.draw.renderer import Renderer
    from fmupsample.upsamplers import ReSFU, ReSFUConfig, base

    seen = []

    def watched(value, weights, **options):
        seen.append(value.shape[1])
        return reassemble(value, weights, **options)

    reassemble = base.reassemble
    monkeypatch.setattr(base, "reassemble", watched)
    head = ReSFU(ReSFUConfig(channels=6, embedding=8, middle=16))
    pipeline, item = only_item(draw(tmp_path / "a.png", 64, 96), head)
    artist = Renderer(pipeline, layout=layout, foreground=foreground)
    tokens = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    artist.draw_pca(item, PCABasis.fit(tokens))
    assert seen == [4 if foreground else 3]  # scores and foreground, of 6 channels


@pytest.mark.parametrize("fit", ["resize", "pad"])
@pytest.mark.parametrize("text", ["image", "original", "x4", "x2.5", "17x90", "3x3", "1x1"])
def test_every_output_size(tmp_path: Path, text: str, fit: str) -> None:
    pipeline, item = only_item(draw(tmp_path / "a.png", 37, 50), fit=fit)
    size = parse_output_size(text, item.frame, item.grid)
    out = pipeline.upsample(item, size)
    assert out.shape == (6, *size)
    # The gradient runs from -2 to 2 over the whole picture, however it is padded or enlarged.
    red = out[0].mean(0)
    assert float(red.mean()) == pytest.approx(0, abs=0.3)
    if size[1] > 1:
        assert (red.diff() >= 0).all()
        assert float(red[-1]) == pytest.approx(-float(red[0]), abs=0.7)


def test_integer_ratios_stay_integer_under_padding(tmp_path: Path, monkeypatch) -> None:
    class Ratio4(Blocks):
        fixed_ratio = 4

    for height, width in ((37, 50), (33, 63), (90, 41), (32, 33)):
        path = draw(tmp_path / f"{height}.png", height, width)
        pipeline, item = only_item(path, Ratio4(), fit="pad")
        size = parse_output_size("x4", item.frame, item.grid)
        assert pipeline.upsample(item, size).shape == (6, *size)


def test_slices_are_the_whole(tmp_path: Path, monkeypatch) -> None:
    pipeline, item = only_item(draw(tmp_path / "a.png"))
    whole = pipeline.upsample(item)
    monkeypatch.setattr(maps, "_CHUNK_BYTES", 4 * 2 * whole[0].numel())
    slices = list(pipeline.upsample_in_slices(item))
    assert [s.shape[0] for s in slices] == [2, 2, 2]
    torch.testing.assert_close(torch.cat(slices), whole)


@pytest.mark.parametrize("fit", ["resize", "pad"])
def test_huge_maps_are_made_smaller_and_enlarged(tmp_path: Path, monkeypatch, fit: str) -> None:
    asked = []

    class Watched(Blocks):
        def kernels(self, x, guidance=None, size=None):
            asked.append(size)
            return super().kernels(x, guidance, size)

    pipeline, item = only_item(draw(tmp_path / "a.png", 37, 50), Watched(), fit=fit)
    direct = pipeline.upsample(item, (370, 500))
    monkeypatch.setattr(sizes, "_DIRECT_PIXELS", 100 * 140)
    enlarged = pipeline.upsample(item, (370, 500))
    assert asked[0][0] >= 370 and asked[1][0] * asked[1][1] < 16_000
    assert enlarged.shape == direct.shape
    # the same but for soft steps between the blocks
    assert float((enlarged - direct).abs().mean()) < 0.1
    slices = torch.cat(list(pipeline.upsample_in_slices(item, (370, 500))))
    torch.testing.assert_close(slices, enlarged)


def test_upsampler_that_is_not_linear(tmp_path: Path) -> None:
    pipeline, item = only_item(draw(tmp_path / "a.png", 32, 32), NotLinear())
    torch.testing.assert_close(
        pipeline.upsample(item), 2 * item.features.repeat_interleave(8, 1).repeat_interleave(8, 2)
    )
    with pytest.raises(UsageError, match="not linear"):
        pipeline.upsample(item, value=item.features[:1])


def test_fixed_size_backbone(tmp_path: Path) -> None:
    pipeline = Pipeline(PatchMeans(fixed_size=(32, 32)), Blocks())
    (item,) = pipeline.items(find_images([draw(tmp_path / "a.png", 30, 60)]), on_error=no_error)
    assert item.features.shape == (6, 4, 4)
    assert pipeline.upsample(item).shape == (6, 16, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size 0"),
        ({"workers": -1}, "-1 workers"),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
        ({"precision": "int8"}, "precision 'int8' is unknown"),
        ({"device": "toaster"}, "device 'toaster' is unknown"),
        ({"device": "meta"}, "device 'meta' is unknown"),
        ({"fit": "crop"}, "--fit crop is unknown"),
        ({"image_size": ImageSize(exact=(30, 32))}, "the nearest is 32x32"),
    ],
)
def test_usage_errors(options, message) -> None:
    with pytest.raises(UsageError, match=message):
        Pipeline(PatchMeans(), **options)


def test_without_upsampler(tmp_path: Path) -> None:
    pipeline = Pipeline(PatchMeans())
    (item,) = pipeline.items(find_images([draw(tmp_path / "a.png")]), on_error=no_error)
    with pytest.raises(UsageError, match="without an upsampler"):
        pipeline.upsample(item)


def test_devices(monkeypatch) -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto").type in ("cpu", "mps")
    with pytest.raises(UsageError, match="use --device cpu"):
        resolve_device("cuda:0")


def test_bf16_gives_float32_features(tmp_path: Path) -> None:
    seen = []

    class Linear(PatchMeans):
        def forward(self, images):
            seen.append((torch.ones(1, 1) @ torch.ones(1, 1)).dtype)
            return super().forward(images).bfloat16()

    pipeline = Pipeline(Linear(), precision="bf16")
    (item,) = pipeline.items(find_images([draw(tmp_path / "a.png")]), on_error=no_error)
    assert seen == [torch.bfloat16] and item.features.dtype == torch.float32


def test_prefetch_is_bounded_and_ordered() -> None:
    running, most = 0, 0
    lock = threading.Lock()

    def work(n: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        if n == 3:
            raise ValueError("three")
        return n * n

    results = []
    for n, value, error in prefetch(work, range(20), workers=3, ahead=4):
        time.sleep(0.002)
        with lock:
            running -= 1
        results.append((n, value if error is None else str(error)))
    assert results == [(n, n * n if n != 3 else "three") for n in range(20)]
    assert most <= 5


def test_leaving_early_does_not_wait() -> None:
    release = threading.Event()
    began = time.perf_counter()
    loop = prefetch(lambda n: release.wait(5) if n else 0, range(50), workers=2, ahead=6)
    assert next(loop)[1] == 0
    loop.close()
    assert time.perf_counter() - began < 2
    release.set()
