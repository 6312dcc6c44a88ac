"""Heads in folders and repositories of the hub, which a local server plays here."""

from __future__ import annotations

import hashlib
import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

import fmupsample
from fmupsample import network
from fmupsample.errors import HeadError, UsageError
from fmupsample.upsamplers import ReSFU, ReSFUConfig, hub, load_head, save_head
from fmupsample_cli.main import main


def small_head() -> ReSFU:
    torch.manual_seed(3)
    return ReSFU(ReSFUConfig(channels=64, embedding=8, middle=16, groups=2, norm_groups=4)).eval()


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


# --- folders --------------------------------------------------------------------------------------
def test_a_folder_round_trip(tiny_backbone, tmp_path) -> None:
    head = small_head()
    folder = fmupsample.save_pretrained(head, tmp_path / "r", tiny_backbone, {"data": "a | b"})
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert config["upsampler"] == "resfu" and config["backbone"]["name"] == "test_vit.random"
    card = (folder / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: "fmupsample"\n')
    assert f'load_backbone("test_vit.random", layer={tiny_backbone.layer})' in card
    assert r"a \| b" in card
    assert same(fmupsample.from_pretrained(folder, tiny_backbone), head)
    assert same(fmupsample.load_upsampler(tiny_backbone, folder), head)


def test_a_head_file_keeps_what_it_says(tiny_backbone, tmp_path) -> None:
    save_head(tmp_path / "h.safetensors", small_head(), tiny_backbone, {"seed": 7})
    folder = fmupsample.save_pretrained(tmp_path / "h.safetensors", tmp_path / "r")
    assert (folder / hub.WEIGHTS).read_bytes() == (tmp_path / "h.safetensors").read_bytes()
    assert json.loads((folder / "config.json").read_text())["card"] == {"seed": 7}
    with pytest.raises(UsageError, match="of its own"):
        fmupsample.save_pretrained(tmp_path / "h.safetensors", tmp_path / "r", tiny_backbone)


# --- the hub --------------------------------------------------------------------------------------
@pytest.fixture
def server(monkeypatch, tmp_path):
    """A hub with the repository ``owner/name`` from the folder ``repository``; counts requests."""
    from huggingface_hub import constants

    repository, asked = tmp_path / "repository", []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.wfile.write(self.answer())

        def answer(self) -> bytes:
            asked.append(self.path)
            prefix, _, name = self.path.partition("/resolve/")
            path = repository / name.partition("/")[2]
            if self.path == "/":
                status, data = 200, b"a hub"
            elif prefix == "/owner/name" and path.is_file():
                status, data = 200, path.read_bytes()
            else:
                status, data = 404, b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0123456789" * 4)
            self.end_headers()
            return data

        def log_message(self, *_: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=running.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{running.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield repository, asked
    running.shutdown()
    running.server_close()


def test_from_the_hub_once(server, tiny_backbone) -> None:
    repository, asked = server
    head = small_head()
    fmupsample.save_pretrained(head, repository, tiny_backbone)
    assert same(fmupsample.load_upsampler(tiny_backbone, "hf:owner/name"), head)
    assert asked
    asked.clear()
    assert same(fmupsample.from_pretrained("owner/name", tiny_backbone), head)
    assert not asked  # it is in the cache


def test_the_command_takes_one(server, backbone_file, pictures, tmp_path) -> None:
    repository, _ = server
    weights = backbone_file()
    backbone = fmupsample.load_backbone(weights=weights, layer=2)
    fmupsample.save_pretrained(small_head(), repository, backbone)
    out = tmp_path / "out"
    assert main([
        "extract", str(pictures), "-o", str(out), "--head", "hf:owner/name", "--device", "cpu",
        "--backbone-weights", str(weights), "--image-size", "64", "--quiet",
    ]) == 0  # fmt: skip
    record = json.loads((out / "manifest.jsonl").read_text().splitlines()[-1])
    assert record["options"]["layer"] == "2"  # the head's own


def test_what_is_not_there(server) -> None:
    start = time.monotonic()
    with pytest.raises(HeadError, match=r"no head to be had from .*/owner/other"):
        fmupsample.from_pretrained("owner/other")
    assert time.monotonic() - start < 5


def test_offline_says_so(tiny_backbone) -> None:
    with pytest.raises(HeadError, match=r"hf:owner/name is not on this machine and offline mode"):
        fmupsample.load_upsampler(tiny_backbone, "hf:owner/name")


def test_without_a_network_within_seconds(monkeypatch, tiny_backbone) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setattr(network, "CONNECT_SECONDS", 0.3)
    start = time.monotonic()
    with pytest.raises(HeadError, match=r"127\.0\.0\.1 cannot be reached.*give that file"):
        fmupsample.load_upsampler(tiny_backbone, "hf:owner/name")
    with pytest.raises(HeadError, match=r"cannot be uploaded to owner/name: .*cannot be reached"):
        fmupsample.push_to_hub(small_head(), "owner/name")
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("name", ["hf:name", "hf:a/b/c", "hf:../secret", "hf:owner/na me"])
def test_names_that_are_none(name, tiny_backbone) -> None:
    with pytest.raises(UsageError, match="no repository of the hub"):
        fmupsample.load_upsampler(tiny_backbone, name)


def test_upload(server, monkeypatch, tiny_backbone) -> None:
    """The requests of an upload are the client's business: what it is given is ours."""
    calls = {}

    class Api:
        def __init__(self, token: str | None) -> None:
            calls["token"] = token

        def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
            calls["made"] = (name, private, exist_ok)

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
            calls["files"] = sorted(path.name for path in Path(folder_path).iterdir())
            calls["head"] = load_head(Path(folder_path) / hub.WEIGHTS, tiny_backbone)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    head = small_head()
    address = fmupsample.push_to_hub(head, "owner/name", tiny_backbone, private=True, token="t")
    assert address.endswith("/owner/name")
    assert calls["made"] == ("owner/name", True, True) and calls["token"] == "t"
    assert calls["files"] == ["README.md", "config.json", "model.safetensors"]
    assert same(calls["head"], head)


def test_a_refused_upload(server, monkeypatch) -> None:
    class Api:
        def __init__(self, **_: object) -> None:
            pass

        def create_repo(self, *_: object, **__: object) -> None:
            raise type("GatedRepoError", (Exception,), {})("401")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    with pytest.raises(HeadError, match=r"uploaded to .*/owner/name: .*hf auth login"):
        fmupsample.push_to_hub(small_head(), "owner/name")


# --- what is said of heads that do not fit --------------------------------------------------------
def test_another_layer_names_the_option(tiny_backbone, tmp_path) -> None:
    path = tmp_path / "h.safetensors"
    save_head(path, small_head(), tiny_backbone)
    other = fmupsample.load_backbone("test_vit", layer=0, pretrained=False)
    other.fingerprint, other.name = tiny_backbone.fingerprint, tiny_backbone.name
    with pytest.raises(HeadError, match=rf"another layer: .*use --layer {tiny_backbone.layer},"):
        fmupsample.load_upsampler(other, path)


def test_weights_of_ones_own_are_no_name_to_load(tiny_backbone, tmp_path, backbone_file) -> None:
    from copy import copy

    local = copy(tiny_backbone)
    local.name, local.fingerprint = "test_vit.local-abc", "abc"
    save_head(tmp_path / "h.safetensors", small_head(), local)
    with pytest.raises(HeadError, match="--backbone test_vit --backbone-weights FILE"):
        fmupsample.load_upsampler(tiny_backbone, tmp_path / "h.safetensors")
    local.name = "embedded.v9"
    tiny = copy(tiny_backbone)
    tiny.name = "resnet50.a1_in1k"
    save_head(tmp_path / "h.safetensors", small_head(), local)
    with pytest.raises(HeadError, match="use --backbone embedded, or"):
        fmupsample.load_upsampler(tiny, tmp_path / "h.safetensors")


@pytest.mark.parametrize(
    ("format", "words"),
    [("fmupsample-probe/1", "is a probe, not a head"), ("fmupsample-backbone/1", "is a backbone")],
)
def test_other_files_are_named(format, words, tmp_path, tiny_backbone) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "p.safetensors"
    save_file({"weight": torch.zeros(2)}, path, {"format": format})
    with pytest.raises(HeadError, match=words):
        fmupsample.load_upsampler(tiny_backbone, path)
