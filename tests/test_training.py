"""Whole runs: what comes out, going on after every kind of interruption, guards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from small_training import HEAD, SMALL, assert_same, draw_pictures, options, run
from torch import nn
from toy import ToyBackbone, ToyUpsampler

from fmupsample.errors import FmupsampleError, HeadError, TrainingError, UsageError
from fmupsample.images import find_images
from fmupsample.training import feed, loop
from fmupsample.training.config import TrainConfig
from fmupsample.training.model import learning_rate, make_optimizer
from fmupsample.training.run import train
from fmupsample.upsamplers import BilateralCellsConfig, ReSFUConfig, load_head
from fmupsample.upsamplers.config import Config
from fmupsample.upsamplers.heads import read_head_metadata
from fmupsample.upsamplers.registry import METHODS, Method, Needs


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return draw_pictures(tmp_path / "pictures")


@pytest.fixture
def whole(pictures: Path, tmp_path: Path) -> Path:
    """The head of an uninterrupted run."""
    run(pictures, tmp_path / "whole.safetensors")
    return tmp_path / "whole.safetensors"


def test_what_a_run_leaves(pictures, tmp_path) -> None:
    output, said = tmp_path / "out" / "head.safetensors", []
    report = run(pictures, output, say=said.append, data="discs", recipe="this test")
    assert load_head(output, ToyBackbone()).config.channels == 16
    card = read_head_metadata(output)["card"]
    assert card["data"] == "discs; no labels" and card["recipe"] == "this test"
    assert (card["pictures"], card["held_out_pictures"], card["steps"]) == (7, 1, 8)
    assert card["best_step"] in (4, 8) and card["hardware"] and card["seed"] == 0
    assert card["config"]["image_sizes"] == [32] and card["config"]["precision"] == "fp32"
    held = card["held_out"]
    assert set(held["terms_vs_bilinear"]) == {"crops"} and held["vs_bilinear"] > 0
    work = output.with_name("head.safetensors.train")
    records = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 9))
    assert [r["step"] for r in records if "held_out" in r] == [4, 8]
    assert {"loss", "terms", "lr", "gradient_norm", "seconds"} <= set(records[0])
    for name in ("curve.png", "previews/step-000004-1.png", "previews/step-000008-1.png"):
        assert np.asarray(Image.open(work / name)).std() > 5
    assert TrainConfig.from_dict(json.loads((work / "config.json").read_text())) == report.config
    assert "7 pictures (1 more held out)" in said[0]
    assert json.loads(json.dumps(report.to_json()))["better_than_bilinear"] in (True, False)
    assert not list(output.parent.glob(".*")) and not list(work.glob(".*"))


def test_the_seed_decides(pictures, tmp_path, whole) -> None:
    before = torch.get_rng_state()
    run(pictures, tmp_path / "again.safetensors", workers=0)
    assert torch.equal(before, torch.get_rng_state())
    assert_same(whole, tmp_path / "again.safetensors")
    run(pictures, tmp_path / "other.safetensors", options(seed=1))
    with pytest.raises(AssertionError):
        assert_same(whole, tmp_path / "other.safetensors", 1e-4)


def test_a_run_that_failed_goes_on_to_the_same_head(pictures, tmp_path, whole, monkeypatch) -> None:
    output = tmp_path / "head.safetensors"
    step = loop.Trainer._do_step

    def fail(self, *arguments) -> None:
        if self.step == 6:
            raise RuntimeError("the power is out")
        step(self, *arguments)

    monkeypatch.setattr(loop.Trainer, "_do_step", fail)
    with pytest.raises(RuntimeError, match="power"):
        run(pictures, output)
    assert not output.exists()
    monkeypatch.setattr(loop.Trainer, "_do_step", step)
    with pytest.raises(UsageError, match="unfinished run: --resume"):
        run(pictures, output)
    with pytest.raises(UsageError, match=r"cannot go on with seed 3 \(the run began with 0\)"):
        run(pictures, output, options(seed=3), resume=True)
    extra = draw_pictures(tmp_path / "more", 9)
    with pytest.raises(UsageError, match="other pictures"):
        run(extra, output, resume=True)
    report = run(pictures, output, resume=True)
    assert report.resumed_at == 4
    assert_same(output, whole)
    log = (tmp_path / "head.safetensors.train/log.jsonl").read_text()
    assert [json.loads(r)["step"] for r in log.splitlines()] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]


def test_files_in_the_way(pictures, tmp_path, whole) -> None:
    with pytest.raises(UsageError, match="exists; --overwrite"):
        run(pictures, whole)
    run(pictures, whole, options(steps=2), overwrite=True)
    assert read_head_metadata(whole)["card"]["steps"] == 2
    with pytest.raises(UsageError, match="exclude each other"):
        run(pictures, whole, overwrite=True, resume=True)
    with pytest.raises(UsageError, match=r"must be named \*\.safetensors"):
        run(pictures, tmp_path / "head.pt")
    (tmp_path / "x.safetensors.train").mkdir()
    (tmp_path / "x.safetensors.train/checkpoint.pt").write_text("no")
    with pytest.raises(UsageError, match="is damaged"):
        run(pictures, tmp_path / "x.safetensors", resume=True)


SLOW = """
    import sys, time
    sys.path.insert(0, {tests!r})
    import fmupsample.backbones
    from toy import ToyBackbone
    from fmupsample.training import feed, loop
    step = loop.Trainer._do_step

    def slow(self, *arguments):
        step(self, *arguments)
        time.sleep({sleep})

    loop.Trainer._do_step = slow
    fmupsample.backbones.load_backbone = lambda *a, **k: ToyBackbone()
    from fmupsample_cli.main import main
    sys.exit(main(["train", *sys.argv[1:]]))
"""


def started(*arguments: object, sleep: float = 0.0) -> subprocess.Popen:
    """``fmupsample train`` with the toy backbone, in a process of its own."""
    code = textwrap.dedent(SLOW).format(tests=str(Path(__file__).parent), sleep=sleep)
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments), "--device", "cpu"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for(happened, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 180
    while not happened() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT], ids=lambda k: k.name)
def test_a_stopped_process_goes_on_to_the_same_head(kind, pictures, tmp_path, whole) -> None:
    output, work = tmp_path / "head.safetensors", tmp_path / "head.safetensors.train"
    arguments = [pictures, "-o", output, "--config", json.dumps(SMALL)]
    process = started(*arguments, sleep=0.25)
    # The first validation leaves a checkpoint; then there are three more steps to stop in.
    log = work / "log.jsonl"
    wait_for(lambda: log.exists() and '"step": 5' in log.read_text(), process)
    process.send_signal(kind)
    stdout, stderr = process.communicate(timeout=180)
    assert not output.exists() and stdout == "" and "Traceback" not in stderr
    done = torch.load(work / "checkpoint.pt", weights_only=True)["state"]["step"]
    if kind == signal.SIGINT:
        assert process.returncode == 130, stderr
        assert "the same command with --resume goes on" in stderr
        assert 5 <= done < 8
    else:
        assert process.returncode == -signal.SIGKILL and done == 4
    process = started(*arguments, "--resume", "--json")
    stdout, stderr = process.communicate(timeout=180)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["resumed_at"] == done
    assert_same(output, whole, 1e-6)


def test_a_loss_that_is_not_finite(pictures, tmp_path, monkeypatch) -> None:
    output = tmp_path / "head.safetensors"
    gradients = loop.Trainer._gradients

    def broken(self, samples, step):
        values = gradients(self, samples, step)
        return values if step < 5 else {k: v * float("nan") for k, v in values.items()}

    monkeypatch.setattr(loop.Trainer, "_gradients", broken)
    with pytest.raises(TrainingError, match=r"loss became nan in step 6 of 8.*--resume.*0\.001"):
        run(pictures, output)
    assert not output.exists()
    state = torch.load(
        tmp_path / "head.safetensors.train/checkpoint.pt", weights_only=True
    )["state"]  # fmt: skip
    assert state["step"] == 5
    assert all(torch.isfinite(t).all() for t in state["head"].values())
    monkeypatch.setattr(loop.Trainer, "_gradients", gradients)
    assert run(pictures, output, options(lr=1e-4), resume=True).resumed_at == 5


def test_out_of_memory_halves_the_batch_and_changes_nothing_else(
    pictures, tmp_path, monkeypatch
) -> None:
    run(pictures, tmp_path / "whole.safetensors", options(batch_size=4))
    inner = feed.Feed.batch

    def limited(self, samples, *rest, held=False):
        if len(samples) > 1 and not held:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(self, samples, *rest, held=held)

    monkeypatch.setattr(feed.Feed, "batch", limited)

    class Listener:
        said: ClassVar[list[str]] = []

        def start(self, total, label): ...

        def advance(self, steps=1): ...

        def describe(self, label): ...

        def warn(self, message):
            self.said.append(message)

    run(pictures, tmp_path / "halved.safetensors", options(batch_size=4), progress=Listener())
    assert [m.split(" crops ")[1] for m in Listener.said] == ["in 2 parts", "in 4 parts"]
    assert_same(tmp_path / "whole.safetensors", tmp_path / "halved.safetensors", 1e-5)

    def nothing_fits(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop.Trainer, "_accumulate", nothing_fits)
    with pytest.raises(FmupsampleError, match="single crop of 32x32 pixels needs more memory"):
        run(pictures, tmp_path / "none.safetensors")


def test_views_that_come_again_are_computed_once(pictures, tmp_path) -> None:
    backbone = ToyBackbone()
    report = run(pictures, tmp_path / "h.safetensors", options(steps=30, crops_kept=2, previews=0),
                 backbone=backbone)  # fmt: skip
    # 9 squares of 2 views, low and enlarged; 9 for the scaling; 1 held out, kept as well.
    assert report.pictures == 7
    assert backbone.calls <= 2 * 2 * 9 + 9 + 2


def test_too_few_or_too_small_pictures(tmp_path) -> None:
    output = tmp_path / "head.safetensors"
    few = draw_pictures(tmp_path / "few", 3)
    with pytest.raises(UsageError, match="at least 4 usable pictures and has 3: 3 given; give"):
        run(few, output)
    small = draw_pictures(tmp_path / "small", 6, side=12)
    with pytest.raises(UsageError, match=r"has 0: 6 given, 6 pictures are too small \(under 16"):
        run(small, output)
    assert not output.exists() and not (tmp_path / "head.safetensors.train").exists()


def test_validation_pictures(pictures, tmp_path) -> None:
    own = draw_pictures(tmp_path / "val", 3)
    report = run(pictures, tmp_path / "a.safetensors", validation=find_images([own]))
    assert (report.pictures, report.held_out) == (8, 3)
    both = find_images([pictures / "00.png", pictures / "01.png"])
    report = run(pictures, tmp_path / "b.safetensors", validation=both)
    assert (report.pictures, report.held_out) == (6, 2)
    report = run(pictures, tmp_path / "c.safetensors", options(held_out=0, steps=2))
    assert report.score is None and report.best_step == 2
    assert report.to_json()["held_out"] is None


def test_a_head_goes_on_but_not_with_another_backbone(pictures, tmp_path, whole) -> None:
    again = tmp_path / "again.safetensors"
    run(pictures, again, options(upsampler_config={}, lr=1e-9, steps=2), start_from=whole)
    assert_same(whole, again, 1e-6)
    other = ToyBackbone()
    other.name, other.fingerprint = "other.v2", "ffff"
    with pytest.raises(HeadError, match="made for another backbone"):
        run(pictures, tmp_path / "x.safetensors", start_from=whole, backbone=other)
    with pytest.raises(UsageError, match="keeps its own"):
        changed = options(upsampler_config={"embedding": 16})
        run(pictures, tmp_path / "x.safetensors", changed, start_from=whole)


@pytest.mark.parametrize("name", ["affinity", "bilateral-cells"])
def test_masks(name, tmp_path) -> None:
    """Masks of some of the pictures teach a head of any method that has kernel weights."""
    labels = tmp_path / "labels"
    pictures = draw_pictures(tmp_path / "pictures", 12, labels=labels)
    other = tmp_path / "other"
    other.mkdir()
    for number in range(0, 12, 3):
        (labels / f"{number:02}.png").rename(other / f"{number:02}.png")
    for number in range(1, 12, 4):
        (labels / f"{number:02}.png").unlink(missing_ok=True)
    own = {"affinity": {"embedding": 8, "width": 8, "detail": 4, "key_width": 8}}
    config = options(
        upsampler=name, upsampler_config=own.get(name, {}), objective={"masks": 1.0}, steps=40,
        batch_size=4, lr=5e-3, validate_every=20,
    )  # fmt: skip
    output = tmp_path / "head.safetensors"
    report = run(pictures, output, config, masks=[(labels, 1.0), (other, 0.5)])
    assert set(report.score.terms) == {"masks"} and report.score.ratio < 0.95
    assert report.card["data"].endswith("with labels")
    assert load_head(output, ToyBackbone()).name == name


def test_what_masks_cannot_do(tmp_path) -> None:
    labels = tmp_path / "labels"
    pictures = draw_pictures(tmp_path / "pictures", 8, labels=labels)
    output, masks = tmp_path / "x.safetensors", options(objective={"masks": 1.0})
    with pytest.raises(UsageError, match="needs --masks FOLDER"):
        run(pictures, output, masks)
    with pytest.raises(UsageError, match="no other term looks at masks"):
        run(pictures, output, masks=[(labels, 1.0)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="8 of 8 pictures have no labels"):
        run(pictures, output, masks, masks=[(tmp_path / "empty", 1.0)])
    with pytest.raises(UsageError, match="for upsamplers with kernel weights; carafe has none"):
        run(pictures, output, replace(masks, upsampler="carafe", upsampler_config={}),
            masks=[(labels, 1.0)])  # fmt: skip


def test_what_is_trained_where_nothing_is_asked_for(pictures, tmp_path) -> None:
    plain = TrainConfig(
        image_sizes=(32,), side=48, steps=3, batch_size=2, validate_every=3, previews=0
    )

    def trained(name: str, **changes) -> Config:
        report = run(pictures, tmp_path / name, replace(plain, **changes))
        assert set(report.score.terms) == {"clusters"}
        return load_head(tmp_path / name, ToyBackbone()).config

    config = trained("plain.safetensors")
    assert config == BilateralCellsConfig(16)
    assert (config.keys, config.taper, config.sigma_range) == ("learned", True, 0.6)
    # The colours come in after training, which is one without them.
    assert trained("without.safetensors", upsampler_config={"sigma_range": None}) != config
    assert_same(tmp_path / "plain.safetensors", tmp_path / "without.safetensors")
    assert trained("early.safetensors", late_prior=False) == config
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "plain.safetensors", tmp_path / "early.safetensors")
    assert trained("paper.safetensors", upsampler="resfu") == ReSFUConfig(16)


def test_a_head_learns_edges(tmp_path, monkeypatch) -> None:
    """Drawn edges, features that are colours: a short run must be well ahead of bilinear."""
    pictures = draw_pictures(tmp_path / "pictures", 16)
    monkeypatch.setitem(METHODS, ToyLearned.name, row_of(ToyLearned))
    config = options(
        upsampler=ToyLearned.name, upsampler_config={"sharpness": 0.05}, objective={"crops": 1},
        steps=60, batch_size=4, lr=0.05, held_out=0.3, validate_every=60,
    )  # fmt: skip
    report = run(pictures, tmp_path / "toy.safetensors", config)
    assert report.score.better and report.score.ratio < 0.6
    resfu = options(steps=60, batch_size=4, lr=0.01, held_out=0.3)
    report = run(pictures, tmp_path / "resfu.safetensors", resfu)
    log = (tmp_path / "resfu.safetensors.train/log.jsonl").read_text().splitlines()
    losses = [json.loads(r)["loss"] for r in log if "lr" in r]
    # Random weights blur, three times worse than bilinear; so few steps undo that.
    assert np.mean(losses[-10:]) < 0.6 * losses[0] and report.score.ratio < 1.05


# --- other upsamplers -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ToyConfig:
    channels: int
    sharpness: float = 1.0

    def to_dict(self) -> dict:
        return {"channels": self.channels, "sharpness": self.sharpness}

    @classmethod
    def from_dict(cls, values: dict) -> ToyConfig:
        return cls(**values)


class ToyLearned(ToyUpsampler):
    """The toy upsampler with one number to learn and one to keep."""

    name = "toy-learned"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.sharpness = nn.Parameter(torch.tensor(config.sharpness))
        self.register_buffer("calls", torch.zeros(()))

    def kernels(self, x, guidance=None, size=None):
        self.calls += self.training
        weights = super().kernels(x, guidance, size).clamp_min(1e-12)
        return (self.sharpness * weights.log()).softmax(1)


class ToyLearnedWhole(ToyLearned):
    """The same without kernels to its outside."""

    name = "toy-whole"
    linear_in_value = False

    def forward(self, x, guidance=None, *, size=None):
        return ToyUpsampler.reassemble(self, ToyLearned.kernels(self, x, guidance, size), x)

    def reassemble(self, *_):
        raise AssertionError("not for this one")


def row_of(kind: type[ToyLearned]) -> Method:
    return Method(kind.name, kind, ToyConfig, Needs.OWN_HEAD, "Toy", "for tests")


@pytest.mark.parametrize("kind", [ToyLearned, ToyLearnedWhole])
def test_any_upsampler_with_parameters(kind, pictures, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(METHODS, kind.name, row_of(kind))
    output = tmp_path / "head.safetensors"
    terms = {"crops": 1, "clusters": 1}
    changes = {"upsampler_config": {"sharpness": 0.5}, "lr": 0.05, "objective": terms}
    config = options(upsampler=kind.name, **changes)
    run(pictures, output, config)
    head = load_head(output, ToyBackbone())
    assert isinstance(head, kind) and float(head.sharpness) != 0.5 and float(head.calls) > 0


def test_upsamplers_that_cannot_be_trained(pictures, tmp_path, monkeypatch) -> None:
    output = tmp_path / "head.safetensors"
    with pytest.raises(UsageError, match="'jbu' is not an upsampler with parameters: affinity"):
        run(pictures, output, options(upsampler="jbu", upsampler_config={}))
    with pytest.raises(UsageError, match="guidance map of a decoder"):
        run(pictures, output, options(upsampler_config={**HEAD, "stem": False}))
    with pytest.raises(UsageError, match="channels must be 16"):
        run(pictures, output, options(upsampler_config={**HEAD, "channels": 32}))
    monkeypatch.setitem(METHODS, ToyLearned.name, row_of(ToyLearned))
    monkeypatch.setattr(ToyLearned, "fixed_ratio", 4)
    with pytest.raises(UsageError, match="exactly 4 times, but this backbone has 8x8"):
        run(pictures, output, options(upsampler=ToyLearned.name, upsampler_config={}))


# --- parts ----------------------------------------------------------------------------------------


def test_norms_and_biases_do_not_decay() -> None:
    head = METHODS["resfu"].build({"channels": 16, **HEAD})
    groups = make_optimizer(head, options()).param_groups
    found = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    named = dict(head.named_parameters())
    assert len(found) == len(named)
    assert found[id(named["query.weight"])] == found[id(named["detail_scores.mix.weight"])] == 0.01
    assert found[id(named["query.bias"])] == found[id(named["detail_scores.norm.weight"])] == 0


def test_learning_rate() -> None:
    config = options(steps=100, lr=1.0, warmup=0.1, final_lr=0.01)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:3] == [0.1, 0.2, 0.3] and max(rates) == 1.0 == rates[10]
    assert rates[-1] == pytest.approx(0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_thread_can_train(pictures, tmp_path, whole) -> None:
    """Signals belong to the main thread; elsewhere training does without them."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        pool.submit(run, pictures, tmp_path / "t.safetensors").result()
    assert_same(whole, tmp_path / "t.safetensors", 1e-6)


def test_the_library_by_its_front(pictures, tmp_path) -> None:
    train(ToyBackbone(), find_images([pictures]), tmp_path / "h.safetensors", options(steps=1),
          device="cpu")  # fmt: skip
    assert (tmp_path / "h.safetensors").exists()


@pytest.mark.parametrize("name", ["config.json", "log.jsonl", "curve.png"])
def test_files_of_others_are_not_replaced(pictures, tmp_path, name) -> None:
    work = tmp_path / "work"
    (work / "previews").mkdir(parents=True)
    (work / name).write_text('{"theirs": 1}')
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=f"{name}' exists and was not written by this"):
            run(pictures, tmp_path / "head.safetensors", work=work, overwrite=overwrite)
    assert (work / name).read_text() == '{"theirs": 1}'


def test_overwriting_leaves_pictures_of_others(pictures, tmp_path) -> None:
    work, output = tmp_path / "work", tmp_path / "head.safetensors"
    run(pictures, output, work=work)
    (work / "previews").mkdir(exist_ok=True)
    (work / "previews/mine.png").write_bytes(b"mine")
    run(pictures, output, work=work, overwrite=True)
    assert (work / "previews/mine.png").read_bytes() == b"mine"
