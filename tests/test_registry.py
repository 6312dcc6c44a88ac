"""One row registers a method: everything that lists methods shows it, and says the same."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from math import prod
from pathlib import Path

import pytest
import torch
from drawn import draw
from torch import nn
from toy import ToyBackbone, ToyUpsampler

import fmupsample.upsamplers
from fmupsample.errors import UsageError
from fmupsample.upsamplers import build_for_decoder, load_head, load_official, save_head
from fmupsample.upsamplers.catalogue import catalogue
from fmupsample.upsamplers.config import Config
from fmupsample.upsamplers.registry import (
    METHODS,
    Method,
    Needs,
    any_backbone_names,
    learned_names,
    resolve,
    upsampler_names,
)
from fmupsample_cli.main import main
from fmupsample_cli.options import complete_upsampler

ROOT = Path(__file__).parents[1]


# --- a method of somebody else: a class, and a row ------------------------------------------------


@dataclass(frozen=True)
class TinyConfig(Config):
    sharpness: float = 1.0


class Tiny(ToyUpsampler):
    """The toy upsampler with a number to learn."""

    name = "tiny"
    fingerprint = None

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.sharpness = nn.Parameter(torch.tensor(config.sharpness))

    def kernels(self, x, guidance=None, size=None):
        weights = super().kernels(x, guidance, size).clamp_min(1e-12)
        return (self.sharpness * weights.log()).softmax(1)

    def macs(self, channels, cells, pixels):
        return 0, 9 * channels * prod(pixels)


class TinyFree(ToyUpsampler):
    name = "tiny-free"

    def macs(self, channels, cells, pixels):
        return 0, 9 * channels * prod(pixels)


def load_tiny(state: dict) -> Tiny:
    up = Tiny(TinyConfig(0, sharpness=float(state["s"])))
    return up.eval()


@pytest.fixture
def registered(monkeypatch):
    rows = (
        Method(
            "tiny", Tiny, TinyConfig, Needs.OWN_HEAD, "Tiny!", "of this test", in_decoders=True,
            official={"tiny": load_tiny},
        ),
        Method("tiny-free", TinyFree, None, Needs.NOTHING, "Free!", "of this test, untrained"),
    )  # fmt: skip
    for row in rows:
        monkeypatch.setitem(METHODS, row.name, row)


def test_a_row_is_all_that_the_lists_need(registered, capsys):
    assert {"tiny", "tiny-free"} <= set(fmupsample.upsamplers.UPSAMPLERS)
    assert complete_upsampler("tin") == ["tiny", "tiny-free"]
    assert main(["models", "--upsamplers", "tiny*", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["tiny"]["needs"] == "a head for the backbone" and rows["tiny"]["parameters"] == 1
    assert rows["tiny-free"]["needs"] == "nothing" and rows["tiny-free"]["parameters"] == 0
    assert rows["tiny"]["macs"] == 9 * 384 * 224 * 224
    entry = next(e for e in catalogue(8, (2, 2), (4, 4)) if e.method.name == "tiny")
    assert entry.cost.neighbours == 9 * 8 * 16


def test_it_extracts_and_draws(registered, tmp_path):
    draw(tmp_path / "in" / "a.png", 56, 70)
    common = [str(tmp_path / "in"), "--upsampler", "tiny-free", "--image-size", "56", "--quiet"]
    assert main(["extract", *common, "-o", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out/manifest.jsonl").read_text().splitlines()[0])
    assert record["options"]["upsampler"] == record["options"]["upsampler_fingerprint"]
    assert record["options"]["upsampler"] == "tiny-free"
    assert main(["visualize", *common, "-o", str(tmp_path / "drawn")]) == 0


def test_it_is_measured(registered, tmp_path):
    arguments = ["--device", "cpu", "--sizes", "56", "--rounds", "1", "-o", str(tmp_path)]
    assert main(["bench", "--upsamplers", "tiny,tiny-free", *arguments]) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    weights = {row["method"]: row["weights"] for row in rows}
    assert (weights["tiny"], weights["tiny-free"]) == ("random", "none")


def test_it_has_heads_and_decoders_and_official_parameters(registered, tmp_path):
    backbone = ToyBackbone()
    head = METHODS["tiny"].build({"channels": 16, "sharpness": 2.0})
    save_head(tmp_path / "head.safetensors", head, backbone)
    again = load_head(tmp_path / "head.safetensors", backbone)
    assert isinstance(again, Tiny) and again.config.sharpness == 2 and len(again.fingerprint) == 12
    assert build_for_decoder("tiny", 8, 4, sharpness=3.0).config == TinyConfig(8, 3.0)
    assert load_official("tiny", {"s": torch.tensor(4.0)}).config.sharpness == 4
    with pytest.raises(UsageError, match="has no option bluntness"):
        METHODS["tiny"].build({"channels": 8, "bluntness": 1})


# --- the rows there are ---------------------------------------------------------------------------


@pytest.mark.parametrize("row", METHODS.values(), ids=METHODS)
def test_rows_say_what_is_so(row):
    kind = resolve(row.kind)
    up = row.build({} if row.config is None else row.options(16))
    assert kind.__doc__ and up.name == row.name and up.fingerprint is None
    has_parameters = any(True for _ in up.parameters())
    assert has_parameters == (row.config is not None)
    assert row.learned <= has_parameters and (row.needs == Needs.NOTHING) <= (not has_parameters)
    assert up.cost(16, (4, 4), (8, 8)).parameters == sum(p.numel() for p in up.parameters())
    assert all(callable(resolve(place)) for place in row.official.values())


def test_names():
    assert upsampler_names() == fmupsample.upsamplers.UPSAMPLERS
    assert {"bicubic", "guided"} <= set(upsampler_names()) - set(learned_names())
    assert any_backbone_names()[0] == "affinity"  # the one that serves where there is no own head
    assert {"SAPA", "SAPAConfig", "UPSAMPLERS"} <= set(fmupsample.upsamplers.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Sorcery'"):
        fmupsample.upsamplers.Sorcery  # noqa: B018


def test_listing_methods_imports_no_torch():
    code = (
        "import sys\nfrom fmupsample_cli.options import complete_upsampler\n"
        "assert complete_upsampler('res')\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_readme_says_what_the_command_says():
    needs = {entry.method.name: entry.needs for entry in catalogue(384, (2, 2), (4, 4))}
    text = (ROOT / "README.md").read_text().split("### Upsamplers")[1].split("\n\n")[1]
    told = {}
    for line in text.splitlines()[2:]:
        names, what, _ = (cell.strip() for cell in line.strip("|").split(" | "))
        told |= dict.fromkeys(re.findall(r"`([\w-]+)`", names), what)
    assert told == {name: needs[name] for name in upsampler_names()}
