"""Names, the embedded file, local checkpoints and the hub: what loads, and what is said if not."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from urllib.error import HTTPError

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models import get_pretrained_cfg

from fmupsample import network
from fmupsample.backbones import hub, load_backbone
from fmupsample.backbones.aliases import ALIASES
from fmupsample.backbones.cache import hub_cache
from fmupsample.backbones.names import resolve
from fmupsample.errors import BackboneError


# --- names ----------------------------------------------------------------------------------------
def test_every_alias_is_a_pretrained_model_of_timm():
    known = set(timm.list_pretrained())
    assert {alias.tag for alias in ALIASES.values()} <= known
    for alias in ALIASES.values():
        assert get_pretrained_cfg(alias.tag).hf_hub_id == alias.repository


@pytest.mark.parametrize("name", ["dino-s8", "mobilenetv4-s", "resnet50", "eva02-s"])
def test_the_alias_table_says_what_the_models_say(name):
    backbone = load_backbone(name, pretrained=False)
    alias = ALIASES[name]
    assert (backbone.channels, backbone.stride[0]) == (alias.channels, alias.stride)
    parameters = sum(p.numel() for p in backbone.parameters())
    assert parameters / 1e6 == pytest.approx(alias.params, abs=0.06)


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("DINOv2-S", "vit_small_patch14_dinov2.lvd142m"),
        ("timm/vit_small_patch16_224.dino", "vit_small_patch16_224.dino"),
        ("vit_small_patch14_dinov2", "vit_small_patch14_dinov2.lvd142m"),
        ("resnet50.tv_in1k", "resnet50.tv_in1k"),
    ],
)
def test_names_resolve_to_architecture_and_tag(name, full):
    assert resolve(name).full == full


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dinov2s", "there is no backbone 'dinov2s'.*did you mean dinov2-s"),
        ("vit_smal_patch14_dinov2", "did you mean vit_small_patch14_dinov2"),
        ("resnet50.nothing", "no weights 'nothing' for resnet50; there are a1_in1k"),
        ("", "there is no backbone ''"),
    ],
)
def test_unknown_names_get_suggestions(name, message):
    with pytest.raises(BackboneError, match=message):
        load_backbone(name)


# --- the embedded model ---------------------------------------------------------------------------
def test_a_backbone_file_brings_its_own_facts(backbone_file):
    backbone = load_backbone("embedded", weights=backbone_file())
    assert backbone.name == f"embedded.v1.local-{backbone.fingerprint}"
    assert backbone.architecture == "test_vit"
    assert (backbone.mean, backbone.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.25))
    assert backbone.default_image_size == 160
    assert backbone.card == {"data": "none"}
    assert backbone(torch.zeros(1, 3, 48, 64)).dtype == torch.float32


def test_the_shipped_one_is_found_in_the_weights_package(backbone_file, monkeypatch):
    import fmupsample_weights

    monkeypatch.setattr(fmupsample_weights, "FOLDER", backbone_file().parent)
    assert load_backbone().name == "embedded.v1"
    monkeypatch.setattr(fmupsample_weights, "FOLDER", Path("nowhere"))
    with pytest.raises(BackboneError, match=r"embedded backbone is missing.*reinstall"):
        load_backbone()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "fmupsample-backbone/2"}, "'fmupsample-backbone/2'.*is expected"),
        ({"format": None}, "says format None"),
        ({"mean": None}, "the header lacks mean"),
        ({"std": "[1, 2]"}, "header cannot be understood"),
        ({"card": "{"}, "header cannot be understood"),
        (
            {"architecture": "test_vit2"},
            r"not hold the weights of test_vit2: missing: .* more",
        ),
        ({"model_args": '{"wrong": 1}'}, "may not hold 'wrong'"),
        ({"model_args": '{"strict_img_size": true}'}, "timm cannot build test_vit"),
        ({"model_args": '{"checkpoint_path": "x.pth"}'}, "may not hold 'checkpoint_path'"),
        ({"model_args": '{"pretrained": true}'}, "may not hold 'pretrained'"),
        ({"model_args": '{"pretrained_cfg": {"url": "x"}}'}, "may not hold 'pretrained_cfg'"),
        ({"model_args": '{"depth": 10000000}'}, "depth cannot be 10000000"),
        ({"model_args": '{"depth": 200, "embed_dim": 4096}'}, "larger model than the file"),
        ({"model_args": '{"depth": 256, "dynamic_img_size": true}'}, "not hold the weights"),
        ({"model_args": '{"dynamic_img_size": 1}'}, "dynamic_img_size cannot be 1"),
        ({"model_args": '{"mlp_ratio": 1e999}'}, "mlp_ratio cannot be inf"),
        ({"architecture": "hf-hub:someone/model"}, "is none of timm's"),
        ({"architecture": "local-dir:/tmp/model"}, "is none of timm's"),
        ({"architecture": "vit_small_patch14_dinov2.lvd142m"}, "is none of timm's"),
    ],
)
def test_a_wrong_header_is_explained(backbone_file, changes, message):
    path = backbone_file(**changes)
    with pytest.raises(BackboneError, match=message):
        load_backbone("embedded", weights=path)


def test_numbers_that_torch_cannot_check_are_refused(backbone_file):
    path = backbone_file()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = {name: v.to(torch.float8_e4m3fn) for name, v in load_file(path).items()}
    save_file(state, path, metadata)
    with pytest.raises(BackboneError, match=r"holds torch.float8_e4m3fn; save its weights"):
        load_backbone("embedded", weights=path)


@pytest.mark.parametrize("change", [{"mean": "[0, 0, 1e999]"}, {"std": "[1, 1, 0]"}])
def test_means_that_cannot_be(backbone_file, change):
    with pytest.raises(BackboneError, match="header cannot be understood"):
        load_backbone("embedded", weights=backbone_file(**change))


def test_a_cut_backbone_file_is_damaged(backbone_file):
    path = backbone_file()
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(BackboneError, match="damaged"):
        load_backbone("embedded", weights=path)


# --- local checkpoints ----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def source() -> torch.nn.Module:
    """The model whose weights the checkpoints hold, with a classifier."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return timm.create_model("test_vit").eval()


def _wrapped(state, kind):
    if kind == "plain":
        return state
    if kind == "training":
        return {"model": state, "args": argparse.Namespace(lr=0.1), "epoch": 3}
    if kind == "ddp":
        return {"state_dict": {f"module.{key}": value for key, value in state.items()}}
    inner = {f"module.backbone.{key}": value for key, value in state.items()}
    return {"teacher": inner | {"module.head.last_layer.weight": torch.zeros(3)}, "student": {}}


@pytest.mark.parametrize("kind", ["plain", "training", "ddp", "dino"])
def test_wrappers_and_prefixes_are_taken_off(tmp_path, source, kind):
    path = tmp_path / "weights.pth"
    torch.save(_wrapped(source.state_dict(), kind), path)
    backbone = load_backbone("test_vit", weights=path)
    for key, value in backbone.model.state_dict().items():
        torch.testing.assert_close(value, source.state_dict()[key])
    assert backbone.name == f"test_vit.local-{backbone.fingerprint}"


def test_a_safetensors_checkpoint_loads_the_same(tmp_path, source):
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    torch.save(source.state_dict(), tmp_path / "w.pt")
    paths = [tmp_path / "w.safetensors", tmp_path / "w.pt"]
    first, second = (load_backbone("test_vit", weights=path) for path in paths)
    assert first.fingerprint == second.fingerprint
    renamed = paths[0].rename(tmp_path / "renamed.bin")
    assert load_backbone("test_vit", weights=renamed).fingerprint == first.fingerprint


def test_position_embeddings_are_resized_as_timm_does(tmp_path):
    larger = timm.create_model("test_vit", num_classes=0, img_size=224)
    torch.save(larger.state_dict(), tmp_path / "larger.pth")
    backbone = load_backbone("test_vit", weights=tmp_path / "larger.pth")
    assert backbone.model.pos_embed.shape != larger.pos_embed.shape


class _Payload:
    """Unpickling this would call a function."""

    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_a_pickle_that_runs_code_is_refused(tmp_path, capsys):
    path = tmp_path / "trap.pth"
    torch.save({"state_dict": {"x": _Payload()}}, path)
    with pytest.raises(BackboneError, match="would run code when loaded, so it is refused"):
        load_backbone("test_vit", weights=path)
    assert "never" not in capsys.readouterr().out


def test_damaged_and_foreign_files_are_explained(tmp_path, source):
    whole = tmp_path / "whole.pth"
    torch.save(source.state_dict(), whole)
    files = {
        "cut.pth": (whole.read_bytes()[:5000], "damaged"),
        "text.bin": (b"not a checkpoint at all", "damaged"),
        "empty.pt": (b"", "damaged"),
        "disguised.safetensors": (whole.read_bytes(), "not a whole safetensors file"),
        "pointer.pth": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BackboneError, match=message) as caught:
            load_backbone("test_vit", weights=tmp_path / name)
        assert name in str(caught.value)
    torch.save({"epoch": 3}, tmp_path / "nothing.pt")
    for path, message in (
        (tmp_path / "nothing.pt", "holds no weights"),
        (tmp_path / "absent.pth", "does not exist"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(BackboneError, match=message):
            load_backbone("test_vit", weights=path)


def test_another_architecture_lists_the_first_differences(tmp_path, source):
    path = tmp_path / "vit.pth"
    torch.save(source.state_dict(), path)
    with pytest.raises(BackboneError, match=r"does not fit test_convnext: missing: .*and \d+ more"):
        load_backbone("test_convnext", weights=path)
    # The same names, but deeper: must not be cut to size silently.
    deeper = timm.create_model("test_vit", num_classes=0, depth=7)
    torch.save(deeper.state_dict(), path)
    with pytest.raises(BackboneError, match=r"unexpected: blocks\.6"):
        load_backbone("test_vit", weights=path)
    wider = timm.create_model("test_vit", num_classes=0, mlp_ratio=4)
    torch.save(wider.state_dict(), path)
    with pytest.raises(BackboneError, match=r"wrong shape: blocks\.0\.mlp\.fc1\.weight"):
        load_backbone("test_vit", weights=path)


# --- the hub --------------------------------------------------------------------------------------
def _put_in_cache(full: str, state: dict, filename: str = "model.safetensors") -> Path:
    repository = get_pretrained_cfg(full).hf_hub_id
    folder = hub_cache() / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    if filename.endswith(".safetensors"):
        save_file(state, snapshot / filename)
    else:
        torch.save(state, snapshot / filename)
    return folder


@pytest.mark.parametrize("filename", ["model.safetensors", "pytorch_model.bin"])
def test_cached_weights_load_without_network(source, filename, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    full = resolve("test_vit").full
    _put_in_cache(full, source.state_dict(), filename)
    backbone = load_backbone("test_vit")
    assert backbone.name == full == "test_vit.r160_in1k"
    torch.testing.assert_close(
        backbone.model.blocks[3].attn.qkv.weight, source.blocks[3].attn.qkv.weight
    )
    assert hub.cached_names() == [full]
    with pytest.raises(BackboneError, match=r"a model that is cached \(test_vit\.r160_in1k\)"):
        load_backbone("dinov2-s")


def test_offline_says_what_was_tried_and_the_ways_on():
    with pytest.raises(BackboneError) as caught:
        load_backbone("dinov2-s")
    message = str(caught.value)
    for part in (
        "dinov2-s (vit_small_patch14_dinov2.lvd142m) is not on this machine",
        "offline mode is on",
        "--backbone embedded",
        "--backbone dinov2-s --backbone-weights FILE",
        "cached model (none is yet)",
    ):
        assert part in message


def test_a_silent_network_is_given_up_within_seconds(monkeypatch):
    from huggingface_hub import constants

    def silent(*_arguments, **_options):
        time.sleep(1)
        raise TimeoutError

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(network, "CONNECT_SECONDS", 0.1)
    monkeypatch.setattr(network, "urlopen", silent)
    start = time.monotonic()
    with pytest.raises(BackboneError, match=r"huggingface\.co cannot be reached"):
        load_backbone("dino-s16")
    assert time.monotonic() - start < 1


def test_a_server_out_of_order_is_not_retried_for_minutes(monkeypatch):
    from huggingface_hub import constants

    def unavailable(request, timeout):
        raise HTTPError(request.full_url, 503, "busy", {}, None)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(network, "urlopen", unavailable)
    with pytest.raises(BackboneError, match=r"huggingface\.co is out of order \(HTTP 503\)"):
        load_backbone("dino-s16")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", r"needs its licence accepted: open .*hf auth login"),
        ("RepositoryNotFoundError", "has no weights timm/"),
        ("ConnectError", "the download failed"),
    ],
)
def test_what_the_hub_says_becomes_one_sentence(monkeypatch, kind, message):
    from huggingface_hub import constants

    def fail(_cfg):
        raise type(kind, (Exception,), {})("401 Client Error.\nlong text of the hub")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "unreachable", lambda _address: "")
    monkeypatch.setattr(hub, "_download_hub", fail)
    with pytest.raises(BackboneError, match=message) as caught:
        load_backbone("dinov3-s")
    assert "\n" not in str(caught.value)


def test_a_damaged_download_names_the_file(monkeypatch, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\0" * 64)
    monkeypatch.setattr("fmupsample.backbones.loading.fetch", lambda _wanted: path)
    with pytest.raises(BackboneError, match=r"model\.safetensors is damaged .* delete it"):
        load_backbone("test_vit")


def test_architectures_without_weights_say_so():
    with pytest.raises(BackboneError, match="no pretrained weights for vit_small_resnet26d_224"):
        load_backbone("vit_small_resnet26d_224")


def test_the_header_written_by_the_fixture_is_json(backbone_file):
    from fmupsample_weights import read_metadata

    metadata = read_metadata(backbone_file())
    assert json.loads(metadata["card"]) == {"data": "none"}
    assert read_metadata(Path(__file__)) == {}
