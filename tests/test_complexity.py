"""Costs by formula: against real modules, against a counter, against published tables."""

from __future__ import annotations

import json
import re

import pytest
import torch
from family import decoders
from torch.utils.flop_counter import FlopCounterMode

from fmupsample.errors import UsageError
from fmupsample.upsamplers import (
    CARAFE,
    FADE,
    JAFAR,
    LDAAQU,
    NAF,
    SAPA,
    AnyUp,
    AnyUpConfig,
    CARAFEConfig,
    Deconvolution,
    DeconvolutionConfig,
    DySample,
    DySampleConfig,
    FADEConfig,
    JAFARConfig,
    LDAAQUConfig,
    LearnedBilateral,
    LearnedBilateralConfig,
    NAFConfig,
    PixelShuffle,
    PixelShuffleConfig,
    ReSFU,
    ReSFUConfig,
    SAPAConfig,
    StackConfig,
    UPLiFT,
    UPLiFTConfig,
    Upsampler,
)
from fmupsample.upsamplers.catalogue import catalogue
from fmupsample.upsamplers.registry import METHODS, resolve
from fmupsample_cli.main import main

# Module, configuration, channels of the guidance.
OPERATORS = [
    (ReSFU, ReSFUConfig(24), 3),
    (ReSFU, ReSFUConfig(24, 8, stem=False, detail=False, kernel_size=5), 8),
    (ReSFU, ReSFUConfig(24, similarity="inner"), 3),
    (ReSFU, ReSFUConfig(24, neighbours="coarse"), 3),
    (SAPA, SAPAConfig(24), 3),
    (SAPA, SAPAConfig(24, 20, stem=False, similarity="bilinear", embedding=16), 20),
    (SAPA, SAPAConfig(24, 20, stem=False, similarity="addition", norm=False), 20),
    (SAPA, SAPAConfig(24, stem=False, similarity="inner"), 24),
    (LDAAQU, LDAAQUConfig(24), 0),
    (LDAAQU, LDAAQUConfig(24, groups=2, heads=3, bias=False, kernel_size=5), 0),
    (FADE, FADEConfig(24), 3),
    (FADE, FADEConfig(24, 24, stem=False, gate=True), 24),
    (FADE, FADEConfig(24, 10, stem=False, lite=True), 10),
    (CARAFE, CARAFEConfig(24), 0),
    (CARAFE, CARAFEConfig(24, 4, kernel_size=3, encoder_kernel_size=1), 0),
    (DySample, DySampleConfig(24), 0),
    (DySample, DySampleConfig(24, style="pl", dynamic_scope=True), 0),
    (LearnedBilateral, LearnedBilateralConfig(24), 3),
    (LearnedBilateral, LearnedBilateralConfig(24, correction=False), 3),
    (Deconvolution, DeconvolutionConfig(24, groups=4), 0),
    (PixelShuffle, PixelShuffleConfig(24), 0),
    (decoders.IndexNet, decoders.IndexNetConfig(24, 10), 10),
    (decoders.IndexNet, decoders.IndexNetConfig(24, kind="m2o", context=False, nonlinear=False),
     24),
    (decoders.A2U, decoders.A2UConfig(24, 10), 10),
    (decoders.A2U, decoders.A2UConfig(24, 10, shared=False, kernel_size=5), 10),
]  # fmt: skip
IDS = [f"{kind.__name__}-{n}" for n, (kind, _, _) in enumerate(OPERATORS)]


def parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("kind", "config", "guidance"),
    # ReSFU's shortcuts do less than its formula says.
    [case for case in OPERATORS if case[0] is not ReSFU],
    ids=[name for name in IDS if "ReSFU" not in name],
)
def test_multiply_adds_of_layers_are_what_a_counter_sees(kind, config, guidance):
    up = kind(config).eval()
    size = (6 * getattr(config, "ratio", 2), 8 * getattr(config, "ratio", 2))
    image = torch.randn(1, guidance, *size) if guidance else None
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        up(torch.randn(1, 24, 6, 8), image, size=size)
    seen = counter.get_total_flops() / 2
    expected = up.cost(24, (6, 8), size).convolution
    # Borders are extended by some pixels in a few places (the stem, convolutions by replication).
    assert expected <= seen <= 1.75 * expected
    if kind in (LDAAQU, CARAFE, DySample, LearnedBilateral, decoders.IndexNet, decoders.A2U):
        assert seen == expected
    if kind in (SAPA, FADE) and not config.stem:
        assert seen == expected


def test_multiply_adds_of_anyup():
    """Those of its layers and of the windows' cells, without its shortcuts."""
    config = AnyUpConfig(embedding=16)
    up = AnyUp(config).requires_grad_(True)
    counter = FlopCounterMode(display=False)
    x, image = torch.randn(1, 24, 6, 8), torch.randn(1, 3, 42, 56)
    with counter:
        up(x, image)
    price = up.cost(24, (6, 8), (42, 56))
    assert counter.get_total_flops() / 2 == price.macs - 9 * 24 * 42 * 56  # reassembly is no layer


def test_multiply_adds_of_jafar():
    up = JAFAR(JAFARConfig(24, embedding=16)).requires_grad_(True)
    counter = FlopCounterMode(display=False)
    x, image = torch.randn(1, 24, 6, 8), torch.randn(1, 3, 42, 56)
    with counter:
        up(x, image)
    assert counter.get_total_flops() / 2 == up.cost(24, (6, 8), (42, 56)).macs


def test_multiply_adds_of_naf():
    up = NAF(NAFConfig(embedding=16, rotary_heads=2, kernel_size=5)).requires_grad_(True)
    counter = FlopCounterMode(display=False)
    x, image = torch.randn(1, 24, 6, 8), torch.randn(1, 3, 42, 56)
    with counter:
        up(x, image)
    assert counter.get_total_flops() / 2 == up.cost(24, (6, 8), (42, 56)).macs


def test_multiply_adds_of_uplift():
    up = UPLiFT(UPLiFTConfig(24, width=2, guide=8)).requires_grad_(True)
    counter = FlopCounterMode(display=False)
    x, image = torch.randn(1, 24, 3, 4), torch.randn(1, 3, 48, 64)
    with counter:
        up(x, image)
    assert counter.get_total_flops() / 2 == up.cost(24, (3, 4), (48, 64)).convolution


STACKS = [row for row in METHODS.values() if row.config == "stack:StackConfig"]


@pytest.mark.parametrize("row", STACKS, ids=lambda row: row.name)
def test_stacks(row):
    up = resolve(row.kind)(StackConfig(24, stages=3))
    whole, less = (up.cost(24, (4, 4), size) for size in ((32, 32), (16, 16)))
    assert less.parameters == whole.parameters == parameters(up)
    assert less.macs < whole.macs / 2


def test_a_method_without_a_formula_says_so():
    with pytest.raises(UsageError, match="no formula for what nameless costs"):
        type("Nameless", (Upsampler,), {"name": "nameless"})().cost(8, (4, 4), (8, 8))


# The table in the README of the SAPA repository: what upsamplers add to a SegFormer-B1 at 512 x
# 512. Its head has 256 channels and brings levels of 1/32, 1/16 and 1/8 to 1/4 by three, two and
# one upsamplers of ratio 2; d is 32, K is 5 (A2U: 3).
SEGFORMER = [16, 32, 64, 32, 64, 64]
PUBLISHED = [
    (SAPA, SAPAConfig(256, stem=False, similarity="inner"), 0.75, 0.00),
    (SAPA, SAPAConfig(256, 256, stem=False, similarity="bilinear"), 1.02, 0.10),
    (CARAFE, CARAFEConfig(256), 1.45, 0.44),
    (decoders.IndexNet, decoders.IndexNetConfig(256), 30.65, 12.60),
]


def all_six(up: Upsampler) -> tuple[float, float]:
    """Millions of parameters and 10^9 multiply-adds of the six upsamplers."""
    costs = [up.cost(256, (n, n), (2 * n, 2 * n)) for n in SEGFORMER]
    return sum(c.parameters for c in costs) / 1e6, sum(c.macs for c in costs) / 1e9


@pytest.mark.parametrize(("kind", "config", "gmacs", "millions"), PUBLISHED)
def test_published_costs(kind, config, gmacs, millions):
    assert all_six(kind(config)) == pytest.approx((millions, gmacs), abs=0.0051)


def test_published_costs_that_differ():
    """SAPA-G and A2U are given with less than their published code has."""
    # 0.10 M and 1.02 G there, as SAPA-B: the decoder's own query is not counted.
    millions, gmacs = all_six(SAPA(SAPAConfig(256, 256, stem=False, similarity="gated")))
    assert (round(millions, 2), round(gmacs, 2)) == (0.16, 1.15)
    # 0.06 M there: the vector of downsampling is not counted.
    millions, _ = all_six(decoders.A2U(decoders.A2UConfig(256)))
    assert round(millions - 6 * 257 * 36 / 1e6, 2) == 0.06


def test_the_catalogue_is_whole():
    entries = {entry.method.name: entry for entry in catalogue(384, (16, 16), (224, 224))}
    assert list(entries) == list(METHODS)
    assert entries["bilinear"].cost.parameters == 0 and entries["nearest"].cost.macs == 0
    assert [entries[n].guidance for n in ("sapa", "carafe")] == ["picture", ""]


def test_models_lists_upsamplers(capsys):
    assert main(["models", "--upsamplers", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    sapa = next(row for row in rows if row["name"] == "sapa")
    assert sapa["kind"] == "head" and sapa["parameters"] == parameters(SAPA(SAPAConfig(384)))
    assert sapa["channels"] == 384 and sapa["cells"] == [16, 16] and sapa["pixels"] == [224, 224]
    assert main(["models", "--upsamplers", "dys*"]) == 0
    said = capsys.readouterr().out
    assert "dysample" in said and "carafe" not in said
    assert main(["models", "--upsamplers", "sorcery"]) == 1


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("anyup", r"anyup_paper, download 3.5\d* MB, https://\S+/anyup_paper.pth .*CC-BY-4.0"),
        ("jafar", r"for --head FILE, https://\S+dinov2.lvd142m.pth .*Apache-2.0"),
        ("uplift", r"for --head FILE, https://\S+/uplift_dinov2-s14 .*MIT"),
        ("naf", r"for --head FILE, https://\S+/naf_release.pth .*Apache-2.0"),
    ],
)
def test_models_says_where_checkpoints_are(method: str, said: str, capsys):
    assert main(["models", "--upsamplers", method]) == 0
    assert re.search(said, capsys.readouterr().err)
