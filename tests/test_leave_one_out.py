"""The comparison of a universal head on sources that it never saw, with toy backbones."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_bench import labelled
from toy import ToyBackbone

import leave_one_out
import protocols
from fmupsample.errors import UsageError
from fmupsample.upsamplers.heads import read_head_metadata


@pytest.fixture
def call(tmp_path, monkeypatch):
    def load(name, *, weights=None, layer=None):
        if weights is None:
            return ToyBackbone()
        return ToyBackbone(channels=20, stride=16, name=f"{Path(weights).stem}.v1")

    for module in (leave_one_out, protocols):
        monkeypatch.setattr(module, "load_backbone", load)
    for split in ("train", "val"):
        labelled(tmp_path / "camvid" / split, 4)
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "wide.safetensors").touch()
    options = [
        "--sources", tmp_path / "sources", "--photos", tmp_path / "camvid/train/images",
        "--camvid", tmp_path / "camvid", "-o", tmp_path / "out", "--steps", 2, "--cells", 4,
        "--probe-size", 64, "--limits", 4, 4, "--layers", "wide=1",
    ]  # fmt: skip

    def run(*more: object) -> None:
        leave_one_out.main([str(part) for part in (*options, *more)])

    return run


def test_each_source_is_left_out_once(call, tmp_path):
    call("--only", "train", "--held-out", "embedded")
    heads = tmp_path / "out" / "heads"
    assert sorted(path.name for path in heads.glob("*.safetensors")) == [
        "embedded.safetensors", "without-embedded.safetensors",
    ]  # fmt: skip
    call("--seeds", 1)
    # Both layers of a file are left out with it.
    seen = read_head_metadata(heads / "without-embedded.safetensors")["card"]["backbones"]
    assert seen == ["wide.v1, layer 11", "wide.v1, layer 11"]
    seen = read_head_metadata(heads / "without-wide.safetensors")["card"]["backbones"]
    assert seen == ["toy.v1, layer 11"]
    rows = (tmp_path / "out" / "leave_one_out.md").read_text().splitlines()
    assert [tuple(row.split(" | ")[:2]) for row in rows[2:10]] == [
        (f"| {source}", name)
        for source in ("embedded", "wide")
        for name in ("bilinear", "jbu", "universal", "specialised")
    ]
    assert rows[-1].startswith("| *share of the gain* | universal |")
    assert len({row.count("|") for row in rows}) == 1


def test_sources_that_are_not_there(call):
    with pytest.raises(UsageError, match="none to leave out"):
        call("--held-out", "narrow")
    with pytest.raises(UsageError, match="sources: embedded, wide"):
        call("--layers", "narrow=1")
