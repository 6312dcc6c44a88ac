"""The recipe of the shipped affinity head: its start, its composites, a short run."""

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch
from torch import nn

import composites
import train_affinity
from composites import Composer, read_labelled
from fmupsample.upsamplers import Affinity, AffinityConfig, load_head
from fmupsample.upsamplers.normalisation import MEAN, STD
from lite0 import initialise

SMALL = {"kernel_size": 3, "embedding": 8, "width": 8, "detail": 4, "key_width": 8}


@pytest.fixture(scope="module")
def lite0() -> nn.Module:
    """An EfficientNet-Lite0 with random weights and norms that have seen something."""
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return model


@pytest.fixture
def data(tmp_path) -> Path:
    """Labelled discs and plain gradients."""
    random = np.random.default_rng(0)
    for folder in ("discs/images", "discs/labels", "photos"):
        (tmp_path / folder).mkdir(parents=True)
    for number in range(24):
        labels = np.zeros((60, 80), np.uint8)
        cv2.circle(labels, (40, 30), int(random.integers(12, 25)), 3, -1)
        labels[:4] = 255
        image = random.integers(0, 256, (2, 3))[(labels == 3).astype(int)].astype(np.uint8)
        cv2.imwrite(str(tmp_path / f"discs/images/{number:02}.jpg"), image)
        cv2.imwrite(str(tmp_path / f"discs/labels/{number:02}.png"), labels)
        coarse = random.integers(0, 256, (3, 4, 3)).astype(np.uint8)
        photo = cv2.resize(coarse, (90, 70), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(tmp_path / f"photos/{number:02}.png"), photo)
    return tmp_path


def test_the_encoder_starts_as_the_network_it_is_made_of(lite0) -> None:
    """At half the size, before paddings differ, it is the network's own first group."""
    encoder = Affinity(AffinityConfig()).encoder
    initialise(encoder, lite0.state_dict())
    rgb = torch.rand(1, 3, 32, 48)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    with torch.no_grad():
        expected = lite0.blocks[0](lite0.bn1(lite0.conv_stem((rgb - 0.498) / 0.502)))
        found = encoder._levels((rgb - mean) / std)[0][-1]
    # Beside the border it differs: zeros are other colours in the two normalisations.
    inside = (..., slice(-2), slice(-2))
    torch.testing.assert_close(found[inside], expected[inside], rtol=1e-4, atol=1e-4)
    # And every further block has taken over its own parameters.
    last = lite0.blocks[3][2].conv_pwl.weight
    norm = lite0.blocks[3][2].bn3
    gain = norm.weight * (norm.running_var + 1e-3).rsqrt()
    torch.testing.assert_close(encoder.blocks[7].project.weight, last * gain[:, None, None, None])


def test_composites(data) -> None:
    group = read_labelled(data / "discs", one_object=True)
    assert len(group) == 24
    photos = sorted((data / "photos").iterdir())
    composer = Composer([group], photos, 48)
    rng = np.random.default_rng(1)
    samples = [composer(rng) for _ in range(30)]
    for image, labels in samples:
        assert image.shape == (48, 48, 3) and image.dtype == np.uint8
        assert labels.shape == (48, 48) and labels.dtype == np.uint8
    pasted = sum(len(np.unique(labels[labels > 14])) > 1 for _, labels in samples)
    assert pasted > 5  # with something on them
    # The same numbers, the same samples.
    again = composer(np.random.default_rng(1))
    assert np.array_equal(again[0], samples[0][0]) and np.array_equal(again[1], samples[0][1])


def test_what_is_pasted_has_the_edges_of_its_segment(data, monkeypatch) -> None:
    """On a black ground, what is bright is what the labels say."""
    monkeypatch.setattr(composites, "_as_a_camera", lambda rng, image: image)
    composer = composites.Composer([], sorted((data / "photos").iterdir()), 64)
    rng = np.random.default_rng(2)
    white = np.full((64, 64, 3), 255, np.uint8)
    monkeypatch.setattr(composer, "_texture", lambda rng, image: white)
    monkeypatch.setattr(composites, "_recoloured", lambda rng, image, strength: image)
    for _ in range(12):
        black, none = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
        image, labels = composer._paste(rng, black, none, 20)
        bright = image[:, :, 0] > 127
        assert (bright != (labels == 20)).mean() < 0.01


def test_a_short_run_and_going_on_with_it(data, tmp_path, monkeypatch, lite0, capsys) -> None:
    monkeypatch.setattr(train_affinity, "lite0_state", lite0.state_dict)
    monkeypatch.setattr(
        train_affinity,
        "AffinityConfig",
        lambda kernel_size: AffinityConfig(**{**SMALL, "kernel_size": kernel_size}),
    )
    monkeypatch.setattr(train_affinity, "HELD_OUT", 2)

    def run(output: Path, steps: int) -> dict[str, torch.Tensor]:
        arguments = [str(data), "-o", str(output), "--labelled", "discs:object", "--photos",
                     "photos", "--steps", str(steps), "--batch", "2", "--side", "64", "--every",
                     "2", "--kernel-size", "3"]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["train_affinity.py", *arguments])
        train_affinity.main()
        return load_head(output).state_dict()

    whole = run(tmp_path / "whole.safetensors", 4)

    # Stopped after two of the four steps.
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        judge, calls = train_affinity.judge_head, []

        def judge_once(*arguments: object) -> dict[str, float]:
            calls.append(judge(*arguments))  # before the first step, after 2, after 4
            return calls[-1] if len(calls) < 3 else stop()

        patched.setattr(train_affinity, "judge_head", judge_once)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts.safetensors", 4)
    parts = run(tmp_path / "parts.safetensors", 4)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=0)
    assert "held_out" in capsys.readouterr().out
