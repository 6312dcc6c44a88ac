"""Probes on sampled pixels: what a row holds, and that weights of the true labels do better."""

from __future__ import annotations

import json

import pytest
import torch
from test_bench import labelled
from toy import ToyBackbone

import sampled
from judge import Judge


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setattr(sampled, "load_backbone", lambda *_, **__: ToyBackbone())
    for name, value in {"STEPS": 60, "SAMPLES": 256, "SEEDS": 2, "RATE": 2e-2}.items():
        monkeypatch.setattr(sampled, name, value)
    for split in ("train", "val"):
        labelled(tmp_path / "discs" / split, 4)
    out = tmp_path / "rows.json"
    options = ["--root", str(tmp_path / "discs"), "--classes", "2", "--size", "64x72"]
    sampled.main(
        [*options, "--limits", "3", "2", "--methods", "bilinear", "ceiling", "-o", str(out)]
    )
    results = json.loads(out.read_text())["results"]
    return {row["setting"]["method"]: row for row in results}


def test_a_row_has_both_probes_and_every_seed(rows):
    for row in rows.values():
        assert row["setting"]["limits"] == "3 / 2" and row["setting"]["data"] == "discs"
        for kind in ("preserved", "fitted"):
            assert len(row[f"{kind}_seeds"]) == 2 and all(0 < value <= 100 for value in row[kind])
        assert len(row["foreground"]) == 4  # of two classes: every probe's IoU of the second
    # Weights that know the labels do better than those that know distances only.
    assert rows["ceiling"]["preserved"][1] > rows["bilinear"]["preserved"][1]


def test_what_is_judged():
    labels = torch.zeros(20, 20, dtype=torch.long)
    labels[:, 10:], labels[0] = 1, 255
    shifted = labels.roll(1, 1)
    shifted[:, 0] = 0
    judge = Judge(2, 2)
    judge.add(torch.stack([labels.clamp(max=1), shifted.clamp(max=1)]), labels)
    exact, near = judge.rows()
    assert exact.tolist() == [100, 100, 100]
    assert near[0] > near[1] > 0 and near[2] == 100  # the boundary is within the tolerance
    assert judge.foreground()[0] == 100
