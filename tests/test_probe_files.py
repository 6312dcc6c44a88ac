"""Probe files: what they keep, for whom they are, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import ToyBackbone, ToyUpsampler

from fmupsample.errors import OutputError, ProbeError
from fmupsample.labels.classes import table_of
from fmupsample.pipeline import Pipeline
from fmupsample.probing.linear import LinearProbe
from fmupsample.probing.probe import Probe, load_probe, make_probe, save_probe
from fmupsample.upsamplers import Bilinear

TABLE = table_of(["ground", "disc", "bar"])


def probe(pipeline: Pipeline | None = None, outputs: int = 3, **facts) -> Probe:
    generator = torch.Generator().manual_seed(0)
    linear = LinearProbe(
        torch.randn(outputs, 16, generator=generator), torch.randn(outputs, generator=generator)
    )
    facts = facts or {"classes": TABLE}
    return make_probe(linear, pipeline or here(), card={"note": "ü"}, **facts)


def here(upsampler=None, backbone=None) -> Pipeline:
    return Pipeline(backbone or ToyBackbone(), upsampler or ToyUpsampler(), workers=0)


def header(path) -> dict[str, str]:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


@pytest.mark.parametrize("kind", ["segmentation", "depth"])
def test_a_file_gives_the_probe_back(tmp_path, kind):
    depth = {"low": 0.5, "high": 20.0, "scale": 256.0, "near": 2.0}
    made = probe() if kind == "segmentation" else probe(outputs=256, depth=depth)
    save_probe(tmp_path / "deep/p.safetensors", made)
    back = load_probe(tmp_path / "deep/p.safetensors")
    assert back.task == kind and replace(back, linear=made.linear) == made
    torch.testing.assert_close(back.linear.weight, made.linear.weight, atol=0, rtol=0)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["p.safetensors"]
    back.check(here())


def test_other_features_are_refused_in_a_sentence(tmp_path):
    made = probe()
    other = ToyBackbone()
    other.name, other.fingerprint = "other.v2", "f" * 12
    with pytest.raises(ProbeError, match=r"fitted on backbone toy\.v1 .*not on other\.v2"):
        made.check(here(backbone=other))
    # A probe of an earlier version of the shipped backbone.
    old, new = ToyBackbone(name="embedded.v1"), ToyBackbone(name="embedded.v2")
    new.fingerprint = "f" * 12
    with pytest.raises(ProbeError, match=r"embedded\.v1 .*embedded\.v2 .*no longer shipped"):
        probe(here(backbone=old)).check(here(backbone=new))
    deeper = ToyBackbone()
    deeper.layer = 3
    with pytest.raises(ProbeError, match=r"layer 11.*not on toy\.v1 \(layer 3"):
        made.check(here(backbone=deeper))
    bilinear = Bilinear()
    bilinear.fingerprint = "bilinear"
    with pytest.raises(ProbeError, match=r"fitted on upsampler toy \(toy\), not on bilinear"):
        made.check(here(bilinear))
    retrained = ToyUpsampler()
    retrained.fingerprint = "new"
    with pytest.raises(ProbeError, match=r"not on toy \(new\): give the --head"):
        made.check(here(retrained))
    # The same weights under another name are the same backbone.
    copy = ToyBackbone()
    copy.name = "toy.local-0123"
    made.check(here(backbone=copy))


def test_names_that_can_be_loaded():
    made = probe()
    for name, loadable, needs in (
        ("embedded.v1", "embedded", False),
        ("embedded.v1.local-abc", "embedded", True),
        ("vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_dinov2.lvd142m", False),
        ("vit_small_patch14_dinov2.local-abc", "vit_small_patch14_dinov2", True),
    ):
        named = replace(made, backbone={**made.backbone, "name": name})
        assert (named.loadable_backbone, named.needs_weights) == (loadable, needs)


def test_damaged_and_hostile_files_are_refused(tmp_path):
    path = tmp_path / "p.safetensors"
    save_probe(path, probe())
    whole, tensors, facts = path.read_bytes(), load_file(path), header(path)
    bad = tmp_path / "bad.safetensors"

    def refused(said: str) -> None:
        with pytest.raises(ProbeError, match=said):
            load_probe(bad)

    refused("there is no probe file")
    for cut in (0, 5, 100, len(whole) - 7):
        bad.write_bytes(whole[:cut])
        refused("not a readable safetensors file")
    bad.write_bytes((2**62).to_bytes(8, "little") + whole[8:])
    refused("not a readable safetensors file")
    bad.write_bytes(b"\x80\x04cos\nsystem\n" * 50)  # a pickle is not opened
    refused("not a readable safetensors file")

    def with_tensors(**changes):
        changed = {k: v for k, v in {**tensors, **changes}.items() if v is not None}
        save_file(changed, bad, facts)

    for changes, said in (
        ({"weight": None}, "instead of bias and weight"),
        ({"more": torch.zeros(2)}, "instead of bias and weight"),
        ({"bias": torch.zeros(4)}, "do not fit together"),
        ({"weight": torch.zeros(3)}, "do not fit together"),
        ({"weight": torch.full((3, 16), float("nan"))}, "finite float32"),
        ({"weight": torch.zeros(3, 16, dtype=torch.float64)}, "finite float32"),
        ({"weight": torch.zeros(3, 17)}, "17 channels, but the backbone has 16"),
    ):
        with_tensors(**changes)
        refused(said)

    def with_facts(**changes):
        changed = {k: v for k, v in {**facts, **changes}.items() if v is not None}
        save_file(tensors, bad, changed)

    classes = json.loads(facts["classes"])
    for changes, said in (
        ({"format": "fmupsample-head/1"}, "not a probe file of this version"),
        ({"format": None}, "'not stated'"),
        ({"classes": None}, "damaged: KeyError"),
        ({"classes": "["}, "damaged"),
        ({"classes": "[" * 100_000}, "damaged"),
        ({"classes": "null"}, "neither classes nor depth"),
        ({"classes": json.dumps({**classes, "names": ["a", "b"]})}, "every class needs"),
        ({"classes": json.dumps({**classes, "values": [0, 1, 1]})}, "value 1"),
        ({"classes": json.dumps({**classes, "colours": [[0, 0, 999]] * 3})}, "0 to 255"),
        ({"backbone": json.dumps({"name": "x"})}, "damaged: KeyError"),
        ({"pictures": json.dumps({"image_size": 4, "fit": "", "precision": ""})}, "not text"),
        ({"card": "3"}, "damaged"),
    ):
        with_facts(**changes)
        refused(said)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        save_probe(tmp_path / "file/p.safetensors", probe())


def test_classes_in_parts_are_classes_at_once(monkeypatch):
    from fmupsample.probing import tasks as module

    made = probe()
    logits = torch.randn(3, 6, 7, generator=torch.Generator().manual_seed(1))
    whole = made.decide(logits, (12, 14))
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)
    torch.testing.assert_close(made.decide(logits, (12, 14)), whole)
    expected = torch.nn.functional.interpolate(logits[None], (12, 14), mode="bilinear")[0].argmax(0)
    torch.testing.assert_close(whole, expected)
