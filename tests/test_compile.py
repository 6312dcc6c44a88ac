"""``torch.compile``: one graph, the numbers of eager code, at sizes beyond every threshold."""

from __future__ import annotations

import pytest
import torch
from toy import ToyBackbone

from fmupsample.ops.memory import on_huge_pages
from fmupsample.upsamplers import (
    NAF,
    AnyUp,
    AnyUpConfig,
    NAFConfig,
    Upsampler,
    load_upsampler,
)

SIDE = 448  # maps of 8 MB and more lie on huge pages


def inputs(channels: int = 24, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(batch, channels, SIDE // 14, SIDE // 16, generator=generator),
        torch.randn(batch, 3, SIDE, SIDE - 14, generator=generator),
    )


def upsampler(name: str) -> Upsampler:
    return load_upsampler(ToyBackbone(channels=24), name).eval()


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["nearest", "bilinear", "jbu"])
def test_any_size_by_one_graph(name: str) -> None:
    up = upsampler(name)
    compiled = torch.compile(up, fullgraph=True, dynamic=True, backend="aot_eager")
    x, image = inputs()
    part = x[:, :, :20, :25].contiguous(), image[:, :, :250, :300].contiguous()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, image), up(x, image), rtol=1e-4, atol=1e-4)
        with torch.compiler.set_stance("fail_on_recompile"):
            found = compiled(*part)
        torch.testing.assert_close(found, up(*part), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["guided", "affinity", "bilateral-cells"])
def test_one_size(name: str) -> None:
    up = upsampler(name)
    x, image = inputs()
    compiled = torch.compile(up, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, image), up(x, image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "up",
    [
        AnyUp(AnyUpConfig(embedding=16, heads=2)),
        NAF(NAFConfig(embedding=16, heads=2, rotary_heads=2, kernel_size=3, blocks=1)),
    ],
    ids=lambda up: up.name,
)
def test_encoders_of_the_image_for_one_size_after_the_other(up: Upsampler) -> None:
    up.eval().requires_grad_(False)
    compiled = torch.compile(up, fullgraph=True, backend="aot_eager")
    for cells, pixels in (((3, 4), (12, 17)), ((4, 5), (16, 23))):
        x, image = torch.randn(1, 24, *cells), torch.randn(1, 3, *pixels)
        torch.testing.assert_close(compiled(x, image), up(x, image), rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_eager_code() -> None:
    up = upsampler("jbu")
    compiled = torch.compile(up, fullgraph=True, backend="aot_eager")
    x, image = inputs(8)
    found = []
    for run in (up, compiled):
        value = x.clone().requires_grad_(True)
        run(value, image).square().sum().backward()
        found.append(value.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-3)


def test_nothing_is_asked_about_memory_that_is_not_there() -> None:
    with torch._subclasses.FakeTensorMode():
        fake = torch.empty(1, 64, SIDE, SIDE)
        assert on_huge_pages(fake) is fake
