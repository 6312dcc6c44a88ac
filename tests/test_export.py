"""Exported files give the library's numbers, hold only common operators, or are not written."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from fmupsample import exporting
from fmupsample import upsamplers as u
from fmupsample.errors import OutputError, UsageError
from fmupsample.exporting import files, plain
from fmupsample.exporting.files import Format, export_part
from fmupsample.exporting.folder import export_all
from fmupsample.exporting.parts import exportable_methods, make_part
from fmupsample.exporting.programs import record
from fmupsample.ops import reassemble, similarity
from fmupsample_cli.main import build_app, main

C = 64  # channels of the tiny backbone
SIZE = (32, 48)
ONNX = all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not ONNX, reason="needs the extra fmupsample[export]")

SMALL = {
    "resfu": lambda: u.ReSFU(u.ReSFUConfig(C, embedding=8, middle=16, groups=2, norm_groups=4)),
    "sapa": lambda: u.SAPA(u.SAPAConfig(C, guidance_channels=4, embedding=4, kernel_size=3)),
    "lda-aqu": lambda: u.LDAAQU(u.LDAAQUConfig(C, reduction=8, kernel_size=1)),
    "carafe": lambda: u.CARAFEStack(u.StackConfig(C, operator={"compressed": 4, "kernel_size": 3})),
    "dysample": lambda: u.DySampleStack(u.StackConfig(C)),
}


@pytest.fixture(scope="module")
def made(tiny_backbone):
    """Upsamplers by name, small, with parameters that matter."""

    def make(name: str) -> u.Upsampler:
        if name not in SMALL:
            return u.load_upsampler(tiny_backbone, name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            up = SMALL[name]().eval()
            for parameter in up.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
        return up

    return make


def check_program(part, path) -> None:
    """The part as a program gives the right numbers, by PyTorch's common operators."""
    assert export_part(part, path, Format.pt2).difference < 1e-4
    graph = torch.export.load(path).graph
    names = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    unwanted = ("fmupsample", "grid_sampler", "im2col", "bicubic")  # positions are resized
    assert not [name for name in names if any(word in name for word in unwanted)]


@pytest.mark.parametrize("name", exportable_methods())
def test_programs_are_plain_and_right(name, made, tiny_backbone, tmp_path):
    up = made(name)
    for part in ("kernels", "reassemble") if up.linear_in_value else ("fused",):
        check_program(make_part(part, tiny_backbone, up, SIZE), tmp_path / "x.pt2")


def test_backbone_and_upsampler_in_one(made, tiny_backbone, tmp_path):
    check_program(make_part("fused", tiny_backbone, made("bilinear"), SIZE), tmp_path / "x.pt2")


@needs_onnx
@pytest.mark.parametrize("opset", [17, 18])
def test_onnx_holds_its_own_operators_only(opset, made, tiny_backbone, tmp_path):
    import onnx

    part = make_part("kernels", tiny_backbone, made("jbu"), SIZE)
    assert export_part(part, tmp_path / "k.onnx", opset=opset).difference < 1e-4
    model = onnx.load(tmp_path / "k.onnx")
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    assert "GridSample" not in {node.op_type for node in model.graph.node}
    assert [i.name for i in model.graph.input] == ["image", "features"]
    assert [imported.version for imported in model.opset_import if not imported.domain] == [opset]
    means = [node for node in model.graph.node if node.op_type == "ReduceMean"]
    assert means and all(len(node.input) == (1 if opset == 17 else 2) for node in means)


@needs_onnx
@pytest.mark.parametrize("part", ["backbone", "reassemble"])
def test_onnx_with_a_batch_that_may_change(part, made, tiny_backbone, tmp_path):
    import onnxruntime

    wanted = make_part(part, tiny_backbone, made("bilinear"), SIZE, channels=5)
    assert export_part(wanted, tmp_path / "x.onnx", dynamic=["batch"]).difference < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    inputs = wanted.inputs(4, SIZE)
    (found,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    assert len(found) == 4 and found.shape[1] == (C if part == "backbone" else 5)


@pytest.mark.parametrize("name", ["nearest", "affinity", "bilateral-cells"])
def test_programs_with_a_batch_that_may_change(name, made, tiny_backbone, tmp_path):
    part = make_part("kernels", tiny_backbone, made(name), SIZE)
    found = export_part(part, tmp_path / "x.pt2", Format.pt2, dynamic=["batch"])
    assert found.difference < 1e-4  # of a batch of three, too


@pytest.mark.parametrize("part", ["kernels", "reassemble"])
@pytest.mark.parametrize("name", ["nearest", "bilinear"])
def test_programs_with_sizes_that_may_change(name, part, made, tiny_backbone, tmp_path):
    wanted = make_part(part, tiny_backbone, made(name), SIZE)
    found = export_part(wanted, tmp_path / "x.pt2", Format.pt2, dynamic=["batch", "size"])
    assert found.difference < 1e-4  # of another size, too


@pytest.mark.parametrize("fractional", [False, True])
def test_plain_reassembly_is_the_operator(fractional):
    size, generator = (12, 20), torch.Generator().manual_seed(0)
    value = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, 9, *size, generator=generator, dtype=torch.float64)
    right = reassemble(value, weights, fractional=fractional)
    torch.testing.assert_close(plain.reassemble(value, weights, fractional), right)
    if not fractional:
        query = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)
        right = similarity(query, value, 3, fractional=False)
        torch.testing.assert_close(plain.similarity(query, value, 3, False), right)
    with pytest.raises(UsageError, match="must be a multiple of the number of cells"):
        plain.reassemble(value, weights[:, :, :11], fractional)


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_plain_samples_are_those_of_grid_sample(padding):
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    grid = 1.5 * torch.randn(2, 6, 7, 2, generator=generator, dtype=torch.float64)
    options = {"mode": "bilinear", "padding_mode": padding, "align_corners": False}
    right = F.grid_sample(value, grid, **options)
    torch.testing.assert_close(plain.grid_sample(value, grid, **options), right)


def test_other_plain_forms():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 9, 10, generator=generator)
    torch.testing.assert_close(plain.pool(x, (3, 5)), F.adaptive_avg_pool2d(x, (3, 5)))
    options = {"mode": "bilinear", "align_corners": False, "antialias": True}
    right = F.interpolate(x, (4, 7), **options)
    torch.testing.assert_close(plain.resize(x, (4, 7), **options), right)
    root = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    matrix = root @ root.mT + 0.1 * torch.eye(3, dtype=torch.float64)
    right = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(plain.solve(matrix, right), torch.linalg.solve(matrix, right))


def test_a_file_that_differs_is_not_kept(made, tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(plain, "_neighbours", lambda x, k: torch.stack([x] * k**2, 2))
    folder = tmp_path / "new"
    monkeypatch.setitem(plain._PLAIN, torch.ops.fmupsample.reassemble, plain.reassemble)
    with pytest.raises(OutputError, match="differs from the library's own result by"):
        export_all(tiny_backbone, made("jbu"), folder, ["fused"], size=SIZE, kind=Format.pt2)
    assert not folder.exists()


def test_what_cannot_be_exported_is_refused_in_a_sentence(made, tiny_backbone, capfd):
    with pytest.raises(UsageError, match="bicubic cannot be exported; nearest, "):
        make_part("fused", tiny_backbone, made("bicubic"), SIZE)
    with pytest.raises(UsageError, match="carafe is not linear in its values"):
        make_part("kernels", tiny_backbone, made("carafe"), SIZE)
    part = make_part("fused", tiny_backbone, made("nearest"), SIZE)
    with pytest.raises(UsageError, match="positional embeddings are resized at export"):
        record(part, ["size"])
    part = make_part("kernels", tiny_backbone, made("affinity"), SIZE)
    with pytest.raises(UsageError, match="cannot be exported with dynamic size"):
        record(part, ["size"])
    # PyTorch prints the graph that it gave up on.
    assert capfd.readouterr() == ("", "")


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'fmupsample\[export\]'"):
        exporting.require_onnx()


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(build_app(), ["export", *arguments])
    return result.exit_code, result.stdout


@pytest.fixture
def shipped(backbone_file, monkeypatch):
    import fmupsample_weights

    path = backbone_file()
    monkeypatch.setattr(fmupsample_weights, "FOLDER", path.parent)


def test_the_command_writes_a_file_and_a_script_that_runs(shipped, pictures, tmp_path):
    out = tmp_path / "model"
    options = [
        "--format",
        "pt2",
        "--upsampler",
        "bilinear",
        "--image-size",
        "32x48",
        "--json",
        "-q",
    ]
    code, text = run("-o", str(out), *options)
    assert code == 0
    (file,) = json.loads(text)["files"]
    assert file["difference"] < 1e-4 and file["shapes"]["upsampled"] == [1, C, 32, 48]
    assert {path.name for path in out.iterdir()} == {"fused.pt2", "use_fused_pt2.py"}
    called = [sys.executable, file["script"], str(pictures / "disc.png")]
    shown = subprocess.run(called, capture_output=True, text=True, check=True).stdout
    assert shown.strip() == f"torch.Size([1, {C}, 32, 48])"


def test_the_command_refuses(shipped, tmp_path, capsys):
    out = tmp_path / "model"
    common = ["export", "-o", str(out), "--format", "pt2", "--upsampler", "nearest", "-q"]
    assert main([*common, "--image-size", "native"]) == 2
    assert main([*common, "--image-size", "30"]) == 1
    assert "multiples of 16x16" in capsys.readouterr().err
    assert main([*common, "--parts", "everything"]) == 2
    assert main([*common, "--dynamic", "channels"]) == 2
    assert not out.exists()
    out.mkdir()
    (out / "fused.pt2").write_bytes(b"mine")
    assert main([*common, "--image-size", "32"]) == 1
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert (out / "fused.pt2").read_bytes() == b"mine"
