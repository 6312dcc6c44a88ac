"""``hubconf.py``: what ``torch.hub.load`` gives from a checkout."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from fmupsample.errors import UsageError
from fmupsample.upsamplers import Affinity, JointBilateral, ReSFU
from fmupsample.upsamplers.registry import upsampler_names

ROOT = str(Path(__file__).parents[1])


def load(*arguments, **options):
    return torch.hub.load(ROOT, *arguments, source="local", **options)


def test_every_upsampler_is_listed() -> None:
    module = torch.hub._import_module("hubconf", f"{ROOT}/hubconf.py")
    listed = {name for name in dir(module) if callable(getattr(module, name)) and name[0] != "_"}
    assert {name.replace("-", "_") for name in upsampler_names()} <= listed
    assert "backbone" in listed


def test_methods_and_backbones(tiny_backbone) -> None:
    assert isinstance(load("jbu", sigma_range=0.3), JointBilateral)
    assert isinstance(load("affinity"), Affinity)  # shipped, and serves any backbone
    head = load("resfu", tiny_backbone, pretrained=False, embedding=16)
    assert isinstance(head, ReSFU) and head.config.channels == 64 and not head.training
    assert load("resfu", channels=8, pretrained=False).config.channels == 8
    backbone = load("backbone", "test_vit", pretrained=False)
    images = torch.randn(1, 3, 32, 48)
    assert load("affinity", backbone)(backbone(images), images).shape == (1, 64, 32, 48)


def test_what_is_asked_wrongly() -> None:
    with pytest.raises(UsageError, match="resfu is for one backbone"):
        load("resfu")
    with pytest.raises(UsageError, match="pretrained=False only"):
        load("affinity", radius=3)


def test_a_checkout_finds_its_weights(monkeypatch) -> None:
    """As on a machine that has torch and timm alone."""
    found = importlib.util.find_spec
    monkeypatch.delitem(sys.modules, "fmupsample_weights", raising=False)
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "fmupsample_weights" else found(name, *more),
    )
    assert isinstance(load("affinity"), Affinity)
    origin = sys.modules["fmupsample_weights"].__spec__.origin
    assert Path(origin) == Path(ROOT, "weights", "__init__.py")
