"""Value-first fitting against the materialised route; the cache; the choice of a learning rate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import NotLinear
from PIL import Image
from toy import ToyBackbone, ToyUpsampler

from fmupsample.errors import FmupsampleError, ImageError, ShapeError, UsageError
from fmupsample.images.find import Source, find_images
from fmupsample.images.size import ImageSize
from fmupsample.ops import reassemble, reassemble_at
from fmupsample.pipeline import Pipeline
from fmupsample.probing import (
    EncodedPicture,
    Example,
    FitOptions,
    LinearProbe,
    Store,
    batches,
    encode,
    fit_probe,
    predict,
    training,
)
from fmupsample.probing.cache import kernels_prefix
from fmupsample.probing.tasks import Classes
from fmupsample.progress import SILENT
from fmupsample.upsamplers import Bilinear, JointBilateral, Nearest, ReSFU, ReSFUConfig

COLOURS = np.array([[200, 40, 40], [40, 200, 60], [50, 60, 210]], np.uint8)


def resfu(channels: int = 16, **options) -> ReSFU:
    torch.manual_seed(3)
    config = ReSFUConfig(
        channels, guidance_channels=8, embedding=8, middle=16, norm_groups=4, **options
    )
    return ReSFU(config).eval().requires_grad_(False)


UPSAMPLERS = {
    "nearest": Nearest,
    "bilinear": Bilinear,
    "jbu": JointBilateral,
    "resfu": resfu,
    "resfu coarse": lambda: resfu(neighbours="coarse"),
    "toy": ToyUpsampler,  # has no reassemble_at of its own
}


def draw(folder, count=4, size=(48, 64)):
    """Pictures of coloured halves and a disc, with their labels."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = []
    y, x = np.mgrid[: size[0], : size[1]]
    for i in range(count):
        label = (x > 20 + 5 * i).astype(np.int64)
        label[(y - 22) ** 2 + (x - 30 - 3 * i) ** 2 < 90] = 2
        noise = np.random.default_rng(i).integers(0, 30, (*size, 3))
        Image.fromarray((COLOURS[label] + noise).astype(np.uint8)).save(folder / f"{i}.png")
        label[:2] = 255
        labels.append(torch.from_numpy(label.astype(np.uint8)))
    return find_images([folder]), labels


def examples_of(folder, upsampler, count=4, store=None, **options) -> list[Example]:
    sources, labels = draw(folder, count)
    pipeline = Pipeline(ToyBackbone(), upsampler, image_size=ImageSize.parse("48"), workers=0)
    pictures = encode(pipeline, sources, store or Store(), flips=True, **options)
    return [Example(p, y) for p, y in zip(pictures, labels, strict=True)]


@pytest.mark.parametrize("fractional", [True, False])
@pytest.mark.parametrize(
    "shape", [(3, 4, 42, 56, 3), (5, 6, 7, 9, 3), (1, 1, 9, 4, 3), (4, 5, 4, 5, 5)]
)
def test_chosen_pixels_are_those_of_the_whole_map(shape, fractional):
    h, w, height, width, k = shape
    generator = torch.Generator().manual_seed(h)
    value = torch.randn(1, 6, h, w, generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.randn(1, k * k, height, width, generator=generator, dtype=torch.float64)
    pixels = torch.randint(height * width, (50,), generator=generator)
    whole = reassemble(value, weights, fractional=fractional)[0].flatten(1)[:, pixels].T
    some = reassemble_at(value[0], weights[0], pixels, fractional=fractional)
    torch.testing.assert_close(some, whole, atol=1e-12, rtol=0)
    direction = torch.randn_like(whole)
    (got,) = torch.autograd.grad(some, value, direction)
    (want,) = torch.autograd.grad(whole, value, direction)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_chosen_pixels_of_shapes_that_do_not_fit_are_refused():
    value, weights, pixels = torch.rand(2, 3, 3), torch.rand(9, 6, 6), torch.tensor([0])
    for bad in ((value[None], weights, pixels), (value, weights[:4], pixels),
                (torch.rand(2, 9, 9), weights, pixels)):  # fmt: skip
        with pytest.raises(ShapeError):
            reassemble_at(*bad)


@pytest.mark.parametrize("name", UPSAMPLERS)
def test_every_upsampler_knows_its_pixels(name):
    upsampler = UPSAMPLERS[name]()
    features, image = torch.randn(1, 16, 4, 5), torch.randn(1, 3, 32, 40)
    weights = upsampler.kernels(features, image)
    pixels = torch.tensor([0, 39, 700, 1279, 1240, 700])
    got = upsampler.reassemble_at(weights[0], features[0], pixels)
    want = upsampler(features, image)[0].flatten(1)[:, pixels].T
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["bilinear", "jbu", "resfu", "toy"])
def test_gradients_are_those_of_the_materialised_route(name, tmp_path, monkeypatch):
    """Every pixel, flips among them: the same loss and gradients as on C x H x W features."""
    upsampler = UPSAMPLERS[name]()
    examples = examples_of(tmp_path, upsampler)
    options = FitOptions(rates=(1e-3, 1e-2), pixels=None)
    generator = torch.Generator().manual_seed(0)
    stack = batches.Classifiers(examples, 3, options, generator)
    for number, (weight, _) in enumerate(stack.parameters):
        weight.data *= 20 * (number + 1)  # so that the two classifiers differ, and say something
    data = batches.Batches(examples, upsampler, Classes(3), options, generator)
    batch = [(0, False), (2, True), (3, False)]
    loss = data.loss(stack, batch)
    parameters = [p for both in stack.parameters for p in both]
    got = torch.autograd.grad(loss.sum(), parameters)
    # In pieces, as a fit does it; neither number divides what it divides.
    monkeypatch.setattr(batches, "_MAPS", 4)
    monkeypatch.setattr(batches, "_PIXELS", 300)
    torch.testing.assert_close(data.backward(stack, batch), loss.detach(), atol=1e-5, rtol=1e-5)
    for parameter, gradient in zip(parameters, got, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)

    maps, targets = [], []
    for index, flipped in batch:
        view = examples[index].picture.view(flipped)
        features = view.features.float()[None]
        maps.append(upsampler.reassemble(view.weights.float()[None], features))
        labels = examples[index].labels
        targets.append(labels.flip(-1) if flipped else labels)
    centred = torch.cat(maps) - stack.mean[:, None, None]
    dense = torch.einsum("bchw,cd->bdhw", centred, stack.white)
    target = torch.stack(targets).long()
    for number, (weight, bias) in enumerate(stack.parameters):
        # The kernel weights are rounded to half precision and sum to 1 but for that.
        logits = F.conv2d(dense, weight[:, :, None, None], bias)
        expected = F.cross_entropy(logits, target, ignore_index=255)
        torch.testing.assert_close(loss[number], expected, atol=1e-3, rtol=0)
        for a, b in zip(
            got[2 * number :], torch.autograd.grad(expected, (weight, bias)), strict=False
        ):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_gradients_are_exact_where_weights_sum_to_one(tmp_path):
    """In float64, without the cache's rounding: equal to rounding error."""
    upsampler = resfu().double()
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 16, 4, 5, generator=generator, dtype=torch.float64)
    image = torch.randn(1, 3, 32, 40, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 3, (1, 32, 40), generator=generator)
    kernels = upsampler.kernels(features, image)
    dense = F.conv2d(upsampler.reassemble(kernels, features), weight[:, :, None, None], bias)
    low = LinearProbe(weight, bias).logits(features[0])
    first = upsampler.reassemble(kernels, low[None])
    pixels = torch.arange(32 * 40)
    chosen = upsampler.reassemble_at(kernels[0], low, pixels).T.reshape(1, 3, 32, 40)
    want = torch.autograd.grad(F.cross_entropy(dense, target), (weight, bias))
    for logits in (first, chosen):
        torch.testing.assert_close(logits, dense, atol=1e-12, rtol=0)
        got = torch.autograd.grad(
            F.cross_entropy(logits, target), (weight, bias), retain_graph=True
        )
        torch.testing.assert_close(got, want, atol=1e-13, rtol=0)


def test_drawn_pixels_give_the_expected_gradient(tmp_path):
    """The mean over many draws comes closer to the gradient of all pixels as draws are added."""
    examples = examples_of(tmp_path, Bilinear())
    options = FitOptions(pixels=64)
    generator = torch.Generator().manual_seed(0)
    stack = batches.Classifiers(examples, 3, options, generator)
    batch = [(0, False), (1, True)]

    def gradient(pixels):
        data = batches.Batches(
            examples, Bilinear(), Classes(3), replace(options, pixels=pixels), generator
        )
        return torch.autograd.grad(data.loss(stack, batch).sum(), stack.parameters[0][0])[0]

    exact = gradient(None)
    draws = torch.stack([gradient(64) for _ in range(300)])
    error = (draws.mean(0) - exact).norm()
    single = (draws - exact).flatten(1).norm(dim=1).mean()
    assert error < 2 * single / 300**0.5  # unbiased: falls with the square root of their number


def test_rates_are_fitted_as_if_alone(tmp_path):
    examples = examples_of(tmp_path, JointBilateral())
    options = FitOptions(rates=(1e-3, 2e-2), epochs=3, pixels=200, seed=4)
    together = fit_all(examples, options)
    alone = [fit_all(examples, replace(options, rates=(rate,)))[0] for rate in options.rates]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.weight, b.weight, atol=2e-4, rtol=0)
        torch.testing.assert_close(a.bias, b.bias, atol=2e-4, rtol=0)
    assert (together[0].weight - together[1].weight).abs().max() > 0.01


def fit_all(examples, options) -> list[LinearProbe]:
    """The probes of all rates, with nothing held out."""
    return training.train_all(examples, JointBilateral(), Classes(3), options, SILENT)[0]


def test_a_probe_learns_and_chooses_by_held_out_pictures(tmp_path):
    upsampler = resfu()
    examples = examples_of(tmp_path, upsampler)
    options = FitOptions(rates=(1e-6, 3e-2), epochs=40, pixels=400, seed=1)
    fit = fit_probe(examples, upsampler, 3, options)
    assert fit.rate == 3e-2 and fit.held_out[3e-2] > 0.7 > fit.held_out[1e-6]
    again = fit_probe(examples, upsampler, 3, options)
    torch.testing.assert_close(again.probe.weight, fit.probe.weight, atol=0, rtol=0)
    other = fit_probe(examples, upsampler, 3, replace(options, seed=2))
    assert (other.probe.weight != fit.probe.weight).any()
    (mask,) = predict([fit.probe], upsampler, examples[0].picture.view(), (48, 64))
    judged = examples[0].labels != 255
    assert (mask == examples[0].labels)[judged].float().mean() > 0.85


def test_one_picture_and_one_rate_need_no_choice(tmp_path):
    examples = examples_of(tmp_path, Bilinear(), count=1)
    fit = fit_probe(examples, Bilinear(), 3, FitOptions(rates=(1e-2,), steps=30, pixels=500))
    assert fit.held_out == {} and fit.loss < 1
    with pytest.raises(UsageError, match="second picture"):
        fit_probe(examples, Bilinear(), 3, FitOptions(rates=(1e-2, 1e-3)))


def test_faults_are_named(tmp_path):
    examples = examples_of(tmp_path, Bilinear(), count=2)
    with pytest.raises(UsageError, match=r"0\.png|1\.png"):
        fit_probe(examples, Bilinear(), 2)  # label 2 is not among two classes
    with pytest.raises(UsageError, match="at least one"):
        fit_probe([], Bilinear(), 2)
    with pytest.raises(FmupsampleError, match="diverged"):
        fit_probe(examples, Bilinear(), 3, FitOptions(rates=(1e30,), steps=8, weight_decay=1.0))
    for bad in ({"rates": ()}, {"epochs": 0}, {"holdout": 1.0}, {"pixels": 0}):
        with pytest.raises(UsageError):
            FitOptions(**bad)


def test_labels_take_the_pixel_at_their_centre():
    labels = torch.tensor([[0, 1, 2, 255]], dtype=torch.uint8)
    assert batches.labels_at(labels, (2, 8))[1].tolist() == [0, 0, 1, 1, 2, 2, 255, 255]
    assert batches.labels_at(labels, (1, 4)) is labels


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_what_is_cached_is_not_computed_again(kind, tmp_path):
    sources, _ = draw(tmp_path / "pictures", 2)
    store = Store() if kind == "memory" else Store(0, tmp_path / "cache")
    backbone = ToyBackbone()

    def run(upsampler, size="48", store=store):
        pipeline = Pipeline(backbone, upsampler, image_size=ImageSize.parse(size), workers=1)
        before = backbone.calls
        return encode(pipeline, sources, store, flips=True), backbone.calls - before

    nearest, bilinear = Nearest(), Bilinear()
    nearest.fingerprint, bilinear.fingerprint = "nearest", "bilinear"
    first, calls = run(nearest)
    assert calls == 4
    second, calls = run(nearest)
    assert calls == 0
    assert run(bilinear)[1] == 0  # other kernel weights, the same features
    assert run(nearest, "64")[1] == 4
    if kind == "disk":
        again = Store(0, tmp_path / "cache")
        assert run(nearest, store=again)[1] == 0
        for path in (tmp_path / "cache").glob("features-*"):
            path.write_bytes(b"cut")
        second, calls = run(nearest, store=again)
        assert calls == 4 and not list((tmp_path / "cache").glob(".*"))
    for a, b in zip(first, second, strict=True):
        assert a.view().features.dtype == torch.float16
        for flipped in (False, True):
            torch.testing.assert_close(a.view(flipped).features, b.view(flipped).features)
    # Means of patches know no left and right: flipping the picture flips the features.
    view, flipped = first[0].view(), first[0].view(True)
    torch.testing.assert_close(flipped.features, view.features.flip(-1), atol=2e-3, rtol=0)


def test_memory_is_bounded(tmp_path):
    sources, _ = draw(tmp_path, 3)
    backbone = ToyBackbone()
    pipeline = Pipeline(backbone, resfu(), image_size=ImageSize.parse("48"), workers=0)
    with pytest.raises(UsageError, match="more than the limit"):
        encode(pipeline, sources, Store(memory=100_000))
    assert backbone.calls == 1  # it is known after the first picture
    store = Store(memory=10**6)
    encode(pipeline, sources, store)
    used = store.used
    store.forget(kernels_prefix(pipeline))
    assert 0 < store.used == used - 3 * 2 * 9 * 48 * 64


def test_the_cache_refuses_what_it_cannot_serve(tmp_path):
    sources, _ = draw(tmp_path, 1)
    with pytest.raises(UsageError, match="linear in its values"):
        encode(Pipeline(ToyBackbone(), NotLinear(), workers=0), sources, Store())
    (tmp_path / "bad.png").write_bytes(b"nothing")
    bad = [Source(tmp_path / "bad.png", PurePosixPath("bad.png"))]
    with pytest.raises(ImageError, match=r"bad\.png"):
        encode(Pipeline(ToyBackbone(), Nearest(), workers=0), bad, Store())
    gone = EncodedPicture(bad[0], (("a", "b"),), Store())
    with pytest.raises(FmupsampleError, match="gone"):
        gone.view()


def test_a_fit_is_that_of_the_materialised_features(tmp_path):
    """Whitening, AdamW, cosine decay, flips and batches on maps of all channels: the same probe."""
    upsampler = resfu()
    examples = examples_of(tmp_path, upsampler)
    options = FitOptions(rates=(3e-2,), epochs=4, pixels=None, batch_size=2, seed=5)
    (got,), losses = training.train_all(examples, upsampler, Classes(3), options, SILENT)

    generator = torch.Generator().manual_seed(5)
    stack = batches.Classifiers(examples, 3, options, generator)
    order = batches.Batches(examples, upsampler, Classes(3), options, generator)
    weight, bias = stack.parameters[0]
    optimizer = torch.optim.AdamW([weight, bias], lr=3e-2, weight_decay=options.weight_decay)
    steps, expected = len(losses), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-2 * 0.5 * (1 + np.cos(np.pi * step / steps))
        maps, targets = [], []
        for index, flipped in order.draw(2):
            view = examples[index].picture.view(flipped)
            maps.append(
                upsampler.reassemble(view.weights.float()[None], view.features.float()[None])
            )
            labels = examples[index].labels
            targets.append(labels.flip(-1) if flipped else labels)
        dense = torch.cat(maps) - stack.mean[:, None, None]
        dense = torch.einsum("bchw,cd->bdhw", dense, stack.white)
        logits = F.conv2d(dense, weight[:, :, None, None], bias)
        loss = F.cross_entropy(logits, torch.stack(targets).long(), ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert steps == 8 and expected[-1] < 0.9 * expected[0]
    # Kernel weights in half precision sum to 1 but for their rounding.
    torch.testing.assert_close(losses[:, 0], torch.tensor(expected), atol=2e-3, rtol=0)
    torch.testing.assert_close(got.weight, stack.probes()[0].weight, atol=5e-3, rtol=5e-3)


def test_padding_teaches_nothing(tmp_path):
    """A picture fitted into a larger canvas: labels lie where the picture does, flipped or not."""
    sources, labels = draw(tmp_path / "pictures", 3)
    upsampler = Bilinear()
    upsampler.fingerprint = "bilinear"
    pipeline = Pipeline(
        ToyBackbone(), upsampler, image_size=ImageSize.parse("64x64"), fit="pad", workers=0
    )
    encoded = encode(pipeline, sources, Store(), flips=True)
    view = encoded[0].view()
    assert view.size == (64, 64) and view.placed == (48, 64)
    examples = [Example(e, y) for e, y in zip(encoded, labels, strict=True)]
    data = batches.Batches(
        examples, upsampler, Classes(3), FitOptions(), torch.Generator().manual_seed(0)
    )
    padded = data.labels_of(0, view)
    assert (padded[48:] == 255).all() and torch.equal(padded[:48], labels[0])
    assert torch.equal(data.labels_of(0, view, flipped=True)[:48], labels[0].flip(-1))
    fit = fit_probe(examples, upsampler, 3, FitOptions(rates=(3e-2,), epochs=40, seed=1))
    (mask,) = predict([fit.probe], upsampler, view, (48, 64))
    judged = labels[0] != 255
    assert (mask == labels[0])[judged].float().mean() > 0.8


def test_few_labelled_pixels_are_all_used(tmp_path):
    examples = examples_of(tmp_path, Bilinear(), count=1)
    sparse = torch.full((48, 64), 255, dtype=torch.uint8)
    sparse[5, 7], sparse[40, 50], sparse[20, 60] = 0, 1, 2
    one = [Example(examples[0].picture, sparse)]
    options = FitOptions(pixels=100)
    generator = torch.Generator().manual_seed(0)
    stack = batches.Classifiers(one, 3, options, generator)
    some = batches.Batches(one, Bilinear(), Classes(3), options, generator)
    every = batches.Batches(one, Bilinear(), Classes(3), replace(options, pixels=None), generator)
    for batch in ([(0, False)], [(0, True)]):
        torch.testing.assert_close(some.loss(stack, batch), every.loss(stack, batch))
